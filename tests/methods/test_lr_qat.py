"""LR-QAT against the formulas of its card."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlightning import convert, restore
from qlightning.methods import LRQAT
from qlightning.numerics import Int, PerTensor


def converted(bits: int, granularity: Any = "channel", **options: Any) -> tuple[Any, Tensor]:
    """A converted layer and the weight that it had."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 24))
    weight = net[0].weight.detach().clone()
    convert(net, LRQAT(bits, granularity=granularity, rank=4, **options).quantization()["rules"])
    return net, weight


def in_steps(net: Any, weight: Tensor) -> Tensor:
    """A weight in units of its first step, as (rows, groups, columns of a group)."""
    step = net[0].weight_quantizer.scale.inner
    return weight.reshape(*step.shape[:-1], -1) / step


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("granularity", ["channel", 16])
def test_the_start_is_round_to_nearest_up_to_the_error_of_the_down_cast(bits: int, granularity: Any) -> None:
    net, weight = converted(bits, granularity)
    low, high, error = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 2.0 ** -(9 - bits)
    v = in_steps(net, weight)
    phi = net[0].weight.view(v.shape) / 2.0 ** (8 - bits)
    within = (v >= low) & (v <= high)
    assert float((phi - v)[within].abs().max()) <= error + 1e-6
    codes = net[0].weight_quantizer.quantize(net[0].effective("weight")).codes.view(v.shape)
    rounded = v.round().clamp(low, high)
    from_half = ((v - v.floor()) - 0.5).abs()
    assert (from_half[codes != rounded] <= error + 1e-6).all()
    assert (codes != rounded).float().mean() < 3 * error
    x = torch.randn(5, 64)
    realised = codes * net[0].weight_quantizer.scale.value
    assert torch.equal(net(x), F.linear(x, realised.reshape(24, 64), net[0].bias))


def test_the_range_is_the_best_of_a_hundred_by_the_fourth_power_of_the_error() -> None:
    net, weight = converted(4)
    trials = weight.abs().amax(1, keepdim=True) / 7.5 * torch.linspace(1, 0.01, 100).view(-1, 1, 1)
    errors = ((weight / trials).round().clamp(-8, 7) * trials - weight).pow(4).sum(-1)
    best = trials.gather(0, errors.argmin(0).view(1, -1, 1))[0]
    assert torch.allclose(net[0].weight_quantizer.scale.inner, best, rtol=1e-5)


@pytest.mark.parametrize("downcast", ["fixed", "float", "codes"])
def test_the_integer_model_computes_what_trained(downcast: Any) -> None:
    net, _ = converted(3, downcast=downcast)
    layer, x = net[0], torch.randn(5, 64)
    with torch.no_grad():
        layer.adapter.b.normal_()
        layer.weight_quantizer.scale.value.mul_(1.1)
    y, quantizer = net(x), layer.weight_quantizer
    stored = quantizer.quantize(layer.effective("weight"))
    served = stored.codes.float() * stored.scale
    assert torch.equal(F.linear(x, served, layer.bias), y)
    v = layer.weight.float() / (32 if downcast == "fixed" else 1)
    v = v if downcast != "float" else layer.weight / quantizer.scale.inner
    v = v + 1.0 / 4 * (layer.adapter.b @ layer.adapter.a)
    ties = ((v - v.floor()) - 0.5).abs() < 1e-4
    assert torch.equal(stored.codes[~ties].float(), v.round().clamp(-4, 3)[~ties])
    restore(net)
    assert torch.equal(quantizer.quantize(net[0].weight.detach()).codes, stored.codes)


def test_the_step_learns_from_the_codes_alone_and_never_flips_one() -> None:
    """dL/ds of a row = sum of D times the codes: no term of the rounding."""
    net, _ = converted(4)
    layer, x = net[0], torch.randn(5, 64)
    with torch.no_grad():
        layer.adapter.b.normal_()
    quantizer = layer.weight_quantizer
    codes = quantizer.quantize(layer.effective("weight")).codes
    grad = torch.randn(5, 24)
    net(x).backward(grad)
    local = grad.t() @ x
    assert torch.allclose(quantizer.scale.value.grad[:, 0], (local * codes).sum(1), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        quantizer.scale.value.mul_(1.7)
    assert torch.equal(quantizer.quantize(layer.effective("weight")).codes, codes)


def test_gradients_of_the_update_are_those_of_the_unfused_graph() -> None:
    net, _ = converted(4)
    layer, x = net[0], torch.randn(5, 64)
    with torch.no_grad():
        layer.adapter.b.normal_()
        layer.weight_quantizer.scale.value.mul_(1.25)
    a, b = layer.adapter.a, layer.adapter.b
    s = layer.weight_quantizer.scale.value
    v = layer.weight / 16 + 0.25 * (b @ a)
    v = v.clamp(-8, 7)
    expected = F.linear(x, s * (v + (v.round() - v).detach()), layer.bias)
    grad = torch.randn(5, 24)
    for mine, theirs in zip(
        torch.autograd.grad(net(x), [a, b, s], grad), torch.autograd.grad(expected, [a, b, s], grad), strict=True
    ):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3)


def test_a_weight_is_one_byte_and_the_float_weight_is_gone() -> None:
    net, weight = converted(4)
    assert net[0].weight.dtype == torch.int8
    assert net[0].weight.untyped_storage().nbytes() == weight.numel()
    largest = max(t.untyped_storage().nbytes() for t in [*net.parameters(), *net.buffers()] if t is not net[0].weight)
    assert largest <= 4 * 64 * 4  # A
    assert not net[0].weight.requires_grad


def test_activations_and_the_cache_are_dynamic_and_asymmetric() -> None:
    (scheme,) = LRQAT(4, input_bits=8, kv_bits=4).quantization()["rules"].values()
    assert scheme.input.format == Int(8, symmetric=False)
    assert scheme.kv_cache.format == Int(4, symmetric=False)
    assert not scheme.input.scale.static
    assert scheme.input.granularity != PerTensor()
    assert LRQAT().quantization()["scale_lr"] == pytest.approx(1e-5 / 1e-3)
