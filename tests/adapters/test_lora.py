"""Our own LoRA inside the quantizer, against the composed formula under plain autograd."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlightning import Scheme, convert, restore
from qlightning.adapters import LoRA
from qlightning.layers.layer import plain_class
from qlightning.layers.swap import convert_like
from qlightning.numerics import AbsMax, ClippedSTE, Int, Learned, PerChannel, PerGroup, Quantizer

LAYERS = {
    "Linear": (lambda: nn.Linear(16, 6), (5, 16)),
    "Conv1D": (lambda: Conv1D(6, 16), (5, 16)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "Conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 2), (2, 4, 5, 5)),
}
KINDS = [LoRA(2, 3.0), LoRA(2, 3.0, base="fixed", unit="step"), LoRA(2, 3.0, base="codes"), LoRA(2, 3.0, unit="step")]
SPEC = "int4-channel-learned"


def converted(name: str, adapter: LoRA, weight: Any = SPEC, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    net = nn.Sequential(make()).to(dtype)
    convert(net, {"0": Scheme(weight, adapter=adapter)})
    with torch.no_grad():
        net[0].adapter.b.normal_(0, 0.05 if adapter.unit == "weight" else 0.5)
    return net, torch.randn(shape, dtype=dtype)


def composed(layer: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Q(base + update) with autograd's own derivatives, in a plain layer."""
    adapter, plain = layer.adapter, plain_class(layer)
    base, update = layer.weights()["weight"], b @ a * 1.5
    point = adapter.fixed_point
    if adapter.base != "float":
        base = (base.float() / (16 if adapter.base == "fixed" else 1)) * point.step
    update = update * point.step if adapter.unit == "step" else update
    weight = layer.laid_out(layer.weight_quantizer((base + update).to(x.dtype)))
    twin = copy.copy(layer)
    twin.__class__, twin._parameters = plain, {"weight": weight, "bias": layer.bias}
    return twin(x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("adapter", KINDS, ids=repr)
def test_a_layer_is_the_composed_formula(name: str, adapter: LoRA) -> None:
    net, x = converted(name, adapter)
    layer = net[0]
    step, own = layer.weight_quantizer.scale.value, layer.adapter
    x.requires_grad_()
    leaves = [x, own.a, own.b, step, layer.bias]
    y, expected = layer(x), composed(layer, x, own.a, own.b)
    assert torch.allclose(y, expected, atol=1e-6)
    grad = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=2e-5 * float(theirs.abs().max()) + 1e-6)
    assert layer.weight.requires_grad is False


@pytest.mark.parametrize("adapter", KINDS, ids=repr)
@pytest.mark.parametrize("name", ["Linear", "Conv1D", "ConvTranspose2d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_trained_is_what_restore_leaves(name: str, adapter: LoRA, dtype: torch.dtype) -> None:
    net, x = converted(name, adapter, dtype=dtype)
    layer = net[0]
    quantizer, parameter, trained = copy.deepcopy(layer.weight_quantizer), layer.weight, net(x)
    codes = quantizer.quantize(layer.effective("weight")).codes
    restore(net)
    assert net[0].weight is parameter
    assert parameter.requires_grad
    assert parameter.dtype == dtype
    assert list(net.state_dict()) == list(nn.Sequential(LAYERS[name][0]()).state_dict())
    convert(net, {"0": SPEC})
    net[0].weight_quantizer.load_state_dict(quantizer.state_dict())
    assert torch.equal(quantizer.quantize(net[0].weights()["weight"].detach()).codes, codes)
    assert torch.equal(net(x), trained)


@pytest.mark.parametrize("adapter", KINDS, ids=repr)
def test_nothing_as_large_as_the_weight_is_kept_for_backward(adapter: LoRA) -> None:
    net = nn.Sequential(nn.Linear(64, 64))
    convert(net, {"0": Scheme("int4-g32-learned", adapter=adapter)})
    x = torch.randn(4, 64)
    own = {t.data_ptr() for t in [x, *net.parameters(), *net.buffers()]}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        net(x)
    assert sum(t.numel() for t in saved if t.data_ptr() not in own) <= 4 * 64  # learned scales are small


def test_one_byte_of_each_weight_stays_in_memory() -> None:
    net = nn.Sequential(nn.Linear(256, 128, bias=False))
    parameter = net[0].weight
    convert(net, {"0": Scheme("int3-channel-learned", adapter=LoRA(1, base="fixed"))})
    assert net[0].weight is parameter
    assert parameter.dtype == torch.int8
    assert parameter.untyped_storage().nbytes() == 256 * 128
    held = {t.data_ptr(): t.untyped_storage().nbytes() for t in [*net.parameters(), *net.buffers()]}
    assert sum(held.values()) <= 256 * 128 + 4 * (256 + 128) + 4 * 128 * 4  # A and B; step, its sum, its start, count


@pytest.mark.parametrize("adapter", KINDS, ids=repr)
def test_checkpoints_load_without_naming_the_adapter(adapter: LoRA) -> None:
    net, x = converted("Conv2d, groups", adapter)
    torch.manual_seed(5)
    fresh = nn.Sequential(LAYERS["Conv2d, groups"][0]())
    convert_like(fresh, net.state_dict())
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(x), net(x))
    assert torch.equal(fresh[0].weight, net[0].weight)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), net(x))
        other[0].adapter.b.data.zero_()
        assert not torch.equal(other(x), net(x))


@pytest.mark.parametrize("adapter", KINDS, ids=repr)
@pytest.mark.parametrize("name", ["Conv1D", "ConvTranspose2d"])
def test_a_float_checkpoint_loads_into_a_converted_layer(name: str, adapter: LoRA) -> None:
    """As if the model had held its weights when it was converted."""
    torch.manual_seed(3)
    source = nn.Sequential(LAYERS[name][0]())
    net, x = converted(name, adapter)
    net[0].adapter.b.data.zero_()
    result = net.load_state_dict(source.state_dict())
    assert not result.missing_keys
    expected = copy.deepcopy(source)
    convert(expected, {"0": Scheme(SPEC, adapter=adapter)})
    for one in (net, expected):
        torch.manual_seed(4)
        nn.init.normal_(one[0].adapter.a)
        nn.init.normal_(one[0].adapter.b)
    assert torch.equal(net(x), expected(x))
    assert torch.equal(net[0].weight, expected[0].weight)


def test_a_failed_conversion_gives_every_weight_back_to_the_bit() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(12, 16))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="does not divide"):
        convert(net, {"*": Scheme("int4-g8-learned", adapter=LoRA(2, base="fixed"))})
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


def test_masters_stay_float32_and_the_layer_follows_the_model() -> None:
    net, x = converted("Linear", LoRA(2, 3.0, base="fixed"))
    net.to(torch.bfloat16)
    assert net[0].adapter.a.dtype == net[0].adapter.b.dtype == torch.float32
    y = net(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert net[0].adapter.b.grad.dtype == torch.float32
    restore(net)
    assert net[0].weight.dtype == torch.bfloat16


def test_an_update_starts_at_zero_and_a_as_peft_draws_it() -> None:
    layer = nn.Sequential(nn.Linear(4096, 8))
    plain = copy.deepcopy(layer)
    convert(layer, {"0": Scheme("int8", adapter=LoRA(4))})
    assert not layer[0].adapter.b.any()
    assert torch.equal(layer[0].effective("weight"), plain[0].weight)
    bound = 1 / 4096**0.5  # kaiming_uniform(a=sqrt(5)) over fan-in
    assert 0.95 * bound < float(layer[0].adapter.a.detach().abs().max()) <= bound
    gaussian = nn.Sequential(nn.Linear(4096, 8))
    convert(gaussian, {"0": Scheme("int8", adapter=LoRA(4, init="gaussian"))})
    assert float(gaussian[0].adapter.a.detach().std()) == pytest.approx(0.25, rel=0.05)


def test_an_empty_batch_passes() -> None:
    for adapter in KINDS:
        net, x = converted("Linear", adapter)
        assert net(x[:0]).shape == (0, 6)


@pytest.mark.parametrize(
    ("weight", "adapter", "message"),
    [
        ("fp8e4m3", LoRA(2, base="fixed"), "integers of 2 to 8 bits"),
        (Quantizer(Int(12), PerChannel()), LoRA(2, base="codes"), "integers of 2 to 8 bits"),
    ],
)
def test_what_no_byte_can_hold_is_refused(weight: Any, adapter: LoRA, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(nn.Sequential(nn.Linear(8, 8)), {"0": Scheme(weight, adapter=adapter)})


def test_arguments_are_checked() -> None:
    for wrong in ({"rank": 0}, {"base": "int8"}, {"unit": "steps"}, {"init": "zeros"}, {"alpha": float("nan")}):
        with pytest.raises(ValueError, match="LoRA"):
            LoRA(**wrong)  # type: ignore[arg-type]


def test_tied_weights_take_no_adapter() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match="two weights"):
        convert(net, {"*": Scheme("int8", adapter=LoRA(2))}, tied="share")


def test_groups_and_offsets_are_kept_too() -> None:
    """base="codes" holds W0 = s (code - zero): what the quantizer first made of the weight."""
    weight = Quantizer(Int(4, symmetric=False), PerGroup(8), scale=Learned(), gradient=ClippedSTE())
    net = nn.Sequential(nn.Linear(16, 6))
    x, float_weight = torch.randn(3, 16), net[0].weight.detach().clone()
    convert(net, {"0": Scheme(weight, adapter=LoRA(2, base="codes"))})
    quantizer = net[0].weight_quantizer
    assert torch.equal(net[0].weight, quantizer.quantize(float_weight).codes)
    assert torch.equal(net(x), nn.functional.linear(x, quantizer(float_weight), net[0].bias))


def test_a_dynamic_scale_may_hold_the_step_too() -> None:
    net = nn.Sequential(nn.Linear(16, 6))
    weight = net[0].weight.detach().clone()
    convert(net, {"0": Scheme(Quantizer(Int(4), PerChannel(), scale=AbsMax()), adapter=LoRA(2, base="fixed"))})
    step = weight.abs().amax(1, keepdim=True) / 7.5
    error = (net[0].effective("weight") - weight).abs() / step
    assert float(error[weight / step < 7].max()) <= 1 / 32 + 1e-5
