"""Products of codes beside the same layer's products of decoded values."""

import copy

import pytest
import torch
from torch import nn

from qlightning import Scheme, convert, restore
from qlightning.layers.on_codes import OnCodes
from qlightning.layers.swap import convert_like
from qlightning.numerics import Int, PerChannel, PerToken, PowerOfTwo, Quantizer

INT8 = {"grad_dgrad": "int8-token", "weight_dgrad": "int8-channel", "grad_wgrad": "int8-channel"}
BACKWARD = INT8 | {"input_wgrad": "int8-channel"}
ALL = ["fprop", "dgrad", "wgrad"]


def powers_of_two(bits: int, granularity) -> Quantizer:
    """A quantizer whose decoded values are products of a small integer and a power of two: exact in every product."""
    return Quantizer(Int(bits), granularity, scale=PowerOfTwo())


def layer(scheme: Scheme, sizes=(64, 48), dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*sizes, dtype=dtype))
    convert(model, {"*": scheme})
    return model[0]


def step(linear: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    linear.zero_grad()
    y = linear(x)
    y.backward(grad)
    return [y.detach(), x.grad, *(p.grad for p in linear.parameters())]


def data(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(2, 24, 64, dtype=dtype), torch.randn(2, 24, 48, dtype=dtype)


def test_with_scales_that_are_powers_of_two_every_bit_is_that_of_decoded_values() -> None:
    slots = {
        "grad_dgrad": powers_of_two(8, PerToken()),
        "weight_dgrad": powers_of_two(8, PerChannel()),
        "grad_wgrad": powers_of_two(8, PerChannel()),
        "input_wgrad": powers_of_two(8, PerChannel()),
    }
    operands = {"weight": powers_of_two(4, PerChannel()), "input": powers_of_two(8, PerToken()), "backward": slots}
    results = []
    for product in (None, "codes", OnCodes(ALL)):
        linear = layer(Scheme(**copy.deepcopy(operands), product=product))
        linear.bias.data.zero_()
        results.append(step(linear, *data()))
    for values, fprop, everything in zip(*results, strict=True):
        assert torch.equal(values, fprop)
        assert torch.equal(values, everything)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("weight", "input"),
    [
        ("int8-channel", "int8-token"),
        ("int4-channel-lsq", "int8-token"),
        ("ternary-tensor", "int8-token"),
        ("int4-channel", "int8-tensor-ema"),
        ("int4-g32", "int8-token"),
        ("int4-g16-lsq", "int8-token"),
        ("int4-g64", "int8-tensor-ema"),
        ("fp8e4m3-channel", "fp8e4m3-token"),
    ],
)
def test_the_difference_to_decoded_values_is_within_the_stated_bound(weight, input, dtype) -> None:
    x, grad = data(dtype)
    fast, slow = (layer(Scheme(weight, input=input, product=product), dtype=dtype) for product in ("codes", None))
    for linear in (fast, slow):
        linear.quantizer("input").initialize(x)
    ours, theirs = step(fast, x, grad), step(slow, x, grad)
    q_x, q_w = (fast.quantizer(p)(t).detach().double().abs() for p, t in (("input", x), ("weight", fast.weight)))
    r = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}[dtype]
    y = theirs[0].double()
    bound = (2 * r + 64 * 2.0**-24) * (q_x @ q_w.t()) + 2 * r * y.abs() + 2 * r * (y - fast.bias).abs()
    assert bool(((ours[0].double() - y).abs() <= bound * 1.01).all())
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(one, other)  # backward goes on with decoded values
    assert torch.equal(fast.eval()(x), slow.eval()(x))


def test_the_three_products_are_those_of_int8_codes() -> None:
    x, grad = data()
    linear = layer(Scheme("int8-channel", input="int8-token", backward=BACKWARD, product=OnCodes(ALL)))
    slow = layer(Scheme("int8-channel", input="int8-token", backward=BACKWARD))
    for one, other in zip(step(linear, x, grad), step(slow, x, grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    seen = []
    multiply = torch._int_mm

    def counted(a, b):
        seen.append((tuple(a.shape), tuple(b.shape)))
        return multiply(a, b)

    torch._int_mm = counted
    try:
        step(linear, x, grad)
    finally:
        torch._int_mm = multiply
    assert seen == [((48, 64), (64, 48)), ((48, 48), (48, 64)), ((48, 48), (48, 64))]


@pytest.mark.parametrize("weight", ["int8-channel", "int4-channel-lsq", "fp8e4m3-channel", "int4-g16", "int4-g16-lsq"])
def test_nan_is_seen(weight) -> None:
    input = "fp8e4m3-token" if weight.startswith("fp8") else "int8-token"
    linear = layer(Scheme(weight, input=input, product="codes"))
    x, _ = data()
    x[0, 3, 5] = float("nan")
    assert torch.equal(linear(x).isnan().any(-1).nonzero(), torch.tensor([[0, 3]]))
    x[0, 3, 5] = 0.0
    with torch.no_grad():
        linear.weight[7, 1] = float("nan")
    assert torch.equal(linear(x).isnan().flatten(0, 1).any(0).nonzero(), torch.tensor([[7]]))


def test_a_ramp_and_a_bypass_multiply_values() -> None:
    x, grad = data()
    fast, slow = (layer(Scheme("int4-channel", input="int8-token", product=product)) for product in ("codes", None))
    for strength, enabled in ((0.5, True), (1.0, False)):
        for linear in (fast, slow):
            linear.quantizer("weight").set_strength(strength)
            linear.quantizer("input").enabled = enabled
        assert all(torch.equal(a, b) for a, b in zip(step(fast, x, grad), step(slow, x, grad), strict=True))


def test_a_weight_that_is_on_its_grid_already_is_multiplied_as_it_is() -> None:
    x, grad = data()
    scheme = {"weight": "int8-channel", "input": "int8-token", "backward": BACKWARD}
    fast, slow = (layer(Scheme(**scheme, product=product)) for product in ("codes", None))
    for linear in (fast, slow):
        linear.quantizer("weight").gathered = True
    assert all(torch.equal(a, b) for a, b in zip(step(fast, x, grad), step(slow, x, grad), strict=True))


def test_what_is_kept_of_the_input_are_its_codes() -> None:
    linear = layer(Scheme("int8-channel", input="int8-token", product="codes"))
    x, kept = data()[0].requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x)
    own = {p.data_ptr() for p in linear.parameters()}
    assert sum(t.nbytes for t in kept if t.data_ptr() not in own) == x.numel() + 48 * 4


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (
            {"weight": "int4-asym-g32", "input": "int8-token"},
            "input='int8-token', weight='int8-channel' or 'int4-g128'",
        ),
        ({"weight": "int4-channel", "input": "int8-g32"}, "have no codes"),
        ({"weight": "fp8e4m3-g32", "input": "fp8e4m3-token"}, "have no codes"),
        ({"weight": "int8-channel"}, "have no codes"),
        ({"weight": "int8-channel", "input": "fp8e4m3-token"}, "have no codes"),
        ({"weight": "int8-channel", "input": "int8-asym-token"}, "have no codes"),
        (
            {"weight": "int8-channel", "input": "int8-token", "product": OnCodes(["dgrad"])},
            "backward={'grad_dgrad': 'int8-token', 'weight_dgrad': 'int8-channel'}",
        ),
    ],
)
def test_operands_without_such_codes_are_refused(scheme, message) -> None:
    with pytest.raises(ValueError, match="cannot be converted") as error:
        layer(Scheme(**{"product": "codes"} | scheme))
    assert message in str(error.value)


def test_words_are_checked() -> None:
    with pytest.raises(ValueError, match="product='codes'"):
        Scheme("int8-channel", product="int8")
    with pytest.raises(ValueError, match="'fprop', 'dgrad' and 'wgrad'"):
        OnCodes(["forward"])


def test_a_checkpoint_says_so_and_restore_forgets_it() -> None:
    linear = layer(Scheme("int8-channel", input="int8-token", product="codes"))
    plain = nn.Linear(64, 48)
    convert_like(plain, linear.state_dict())
    plain.load_state_dict(linear.state_dict())
    x, _ = data()
    assert torch.equal(plain(x), linear(x))
    assert plain.on_codes() == OnCodes()
    assert type(restore(plain)) is nn.Linear
    assert set(plain.state_dict()) == {"weight", "bias"}


def test_autocast_gives_its_dtype() -> None:
    linear = layer(Scheme("int8-channel", input="int8-token", product="codes"))
    x, _ = data()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
