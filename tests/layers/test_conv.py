"""Convolutions and transposed convolutions: those of the plain layer with quantized operands, in every geometry."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # the plain layer's own

BOTH = {"weight": "int4", "input": "int8-token"}

CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "1d-same-even-kernel": (lambda: nn.Conv1d(4, 6, 4, padding="same"), (2, 4, 9)),
    "1d-groups-dilation": (lambda: nn.Conv1d(4, 6, 3, groups=2, dilation=2, padding=2), (2, 4, 9)),
    "1d-unbatched": (lambda: nn.Conv1d(4, 6, 3), (4, 9)),
    "2d": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 8)),
    "2d-stride": (lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 2)), (2, 4, 7, 8)),
    "2d-same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 7, 8)),
    "2d-same-uneven": (lambda: nn.Conv2d(4, 6, (2, 3), dilation=(3, 1), padding="same"), (2, 4, 7, 8)),
    "2d-valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 8)),
    "2d-depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (2, 4, 7, 8)),
    "2d-multiplier": (lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=2), (2, 4, 7, 8)),
    "2d-pointwise": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 7, 8)),
    "2d-reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 7, 8)),
    "2d-circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7, 8)),
    "2d-replicate": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="replicate"), (2, 4, 7, 8)),
    "2d-unbatched": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 7, 8)),
    "2d-unbatched-same": (lambda: nn.Conv2d(4, 6, 2, padding="same"), (4, 7, 8)),
    "2d-no-bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (2, 4, 7, 8)),
    "2d-channels-last": (lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), (2, 4, 7, 8)),
    "t1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
    "t1d-groups": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, output_padding=1), (2, 4, 9)),
    "t2d": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 7, 8)),
    "t2d-stride": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=(2, 3), padding=1, output_padding=(1, 2)), (2, 4, 7, 8)),
    "t2d-groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), (2, 4, 7, 8)),
    "t2d-depthwise": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), (2, 4, 7, 8)),
    "t2d-unbatched": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 7, 8)),
}


@pytest.mark.parametrize(
    "scheme", [BOTH, {"weight": "int4-lsq", "input": "int8-tensor-lsq"}, "int4-tensor-asym"], ids=str
)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_geometry(compare, name, scheme):
    layer, shape = CONVOLUTIONS[name]
    compare(layer(), scheme, torch.randn(shape))


@pytest.mark.parametrize("weight", ["int4-g12", "int4-b2x6", "ternary", "binary", "nf4-g4", "int3-clip", "int8-asym"])
@pytest.mark.parametrize("name", ["2d", "t2d"])
def test_weight_quantizers(compare, name, weight):
    layer, shape = CONVOLUTIONS[name]
    compare(layer(), weight, torch.randn(shape))


@pytest.mark.parametrize("input", ["int4-g2", "int8-tensor", "int4-tensor-clip", "fp8e4m3-token", "int8-tensor-ema"])
@pytest.mark.parametrize("name", ["1d", "2d-stride", "t2d-stride", "2d-unbatched"])
def test_input_quantizers(compare, name, input):
    layer, shape = CONVOLUTIONS[name]
    compare(layer(), {"weight": "int4", "input": input}, torch.randn(shape))


@pytest.mark.parametrize("kind", ["float64", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", ["1d", "2d-stride", "2d-same-uneven", "t2d-stride"])
def test_dtypes(compare, name, kind):
    layer, shape = CONVOLUTIONS[name]
    dtype = torch.float32 if kind == "autocast" else getattr(torch, kind)
    compare(layer().to(dtype), BOTH, torch.randn(shape, dtype=dtype), autocast=kind == "autocast")


@pytest.mark.parametrize("output_size", [[13, 15], [14, 16], [2, 6, 13, 16]])
def test_transposed_convolution_of_a_wanted_output_size(compare, output_size):
    pair = compare(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), BOTH, torch.randn(2, 4, 7, 8), output_size)
    y = pair.layer(torch.randn(2, 4, 7, 8), output_size=output_size)
    assert list(y.shape[-2:]) == output_size[-2:]


@pytest.mark.parametrize("frozen", [("weight",), ("x",), ("bias", "x")])
@pytest.mark.parametrize("name", ["2d-same-uneven", "t2d-stride"])
def test_frozen_operands(compare, name, frozen):
    layer, shape = CONVOLUTIONS[name]
    compare(layer(), {"weight": "int4-lsq", "input": "int8-token"}, torch.randn(shape), frozen=frozen)


@pytest.mark.parametrize("name", ["1d", "2d", "t2d", "2d-unbatched"])
def test_output_quantizer_sees_channels_as_features(compare, name):
    layer, shape = CONVOLUTIONS[name]
    compare(layer(), {"weight": "int4", "output": "int4-token"}, torch.randn(shape))


@pytest.mark.parametrize("name", ["1d", "2d", "t2d"])
def test_empty_batch(pair, name):
    layer, shape = CONVOLUTIONS[name]
    converted = pair(layer(), {"weight": "int4-lsq", "input": "int8-token"}, torch.randn(shape)).layer
    y = converted(torch.randn(0, *shape[1:]))
    y.sum().backward()
    assert y.shape[0] == 0
    assert all(p.grad is not None and not p.grad.any() for p in converted.parameters())


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("autocast", [False, True])
def test_bypassed_it_is_the_plain_layer_bit_for_bit(pair, name, autocast):
    layer, shape = CONVOLUTIONS[name]
    plain, x = layer(), torch.randn(shape)
    converted = pair(plain, {**BOTH, "output": "int8-token"}, x).layer
    for _, quantizer in converted.quantizers():
        quantizer.enabled = False
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = converted(x), plain(x)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


def test_zeros_of_padding_are_no_values_of_the_input(pair):
    """A binary input has no zero; padding by name and by number must mean the same all the same."""
    by_number = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    by_name = nn.Conv2d(4, 6, 3, padding="same", bias=False)
    by_name.load_state_dict(by_number.state_dict())
    x = torch.randn(2, 4, 7, 8)
    scheme = {"weight": "int4", "input": "binary-tensor"}
    assert torch.equal(pair(by_number, scheme, x).layer(x), pair(by_name, scheme, x).layer(x))


@settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the autouse seed
)
@given(
    spatial=st.integers(1, 2),
    groups=st.integers(1, 3),
    inputs=st.integers(1, 2),
    outputs=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    size=st.integers(3, 7),
    transposed=st.booleans(),
    data=st.data(),
)
def test_any_geometry(
    compare, spatial, groups, inputs, outputs, kernel, stride, padding, dilation, size, transposed, data
):
    reach = dilation * (kernel - 1) + 1
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d) if transposed else (nn.Conv1d, nn.Conv2d)
    extra = {}
    if transposed:
        assume((size - 1) * stride - 2 * padding + reach > 0)
        extra["output_padding"] = data.draw(st.integers(0, max(stride, dilation) - 1), label="output_padding")
    else:
        assume(size + 2 * padding >= reach)
    layer = kinds[spatial - 1](
        inputs * groups, outputs * groups, kernel, stride, padding, dilation=dilation, groups=groups, **extra
    )
    compare(layer, BOTH, torch.randn(2, inputs * groups, *[size + i for i in range(spatial)]))


def test_in_place_activation_after_it(pair):
    x = torch.randn(2, 4, 7, 8)
    pair = pair(nn.Conv2d(4, 6, 3), {"weight": "int4-lsq"}, x)
    for enabled in (True, False):
        pair.layer.quantizer("weight").enabled = pair.quantizers["weight"].enabled = enabled
        assert torch.equal(nn.ReLU(inplace=True)(pair.layer(x)), pair.composed(x).relu())


def test_geometry_changed_after_conversion_is_obeyed(pair):
    x = torch.randn(2, 4, 7, 8)
    pair = pair(nn.Conv2d(4, 6, 3), BOTH, x)
    for layer in (pair.layer, pair.plain):
        layer.stride, layer.padding = (2, 2), (1, 1)
    assert torch.equal(pair.layer(x), pair.composed(x))
    assert pair.layer(x).shape == copy.deepcopy(pair.plain)(x).shape
