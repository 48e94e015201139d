"""Linear and transformers' Conv1D: outputs and gradients are those of the plain layer with quantized operands."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

WEIGHTS = [
    "int4-g16",
    "int8-asym",
    "int4-b8x16",
    "int4-lsq",
    "int4-g8-lsq",
    "int4-g8-asym-learned",
    "int3-clip",
    "int4-sr",
    "int4-mse",
    "int8-ema",
    "ternary",
    "binary",
    "nf4-g16",
    "log4",
    "fp8e4m3",
    "nvfp4",
    "mxfp4",
]
INPUTS = [
    "int8-token",
    "int8-asym-token",
    "int4-g16",
    "int4-token-clip",
    "int4-token-sr",
    "int8-tensor",
    "int8-tensor-lsq",
    "int4-tensor-asym-learned",
    "int8-tensor-ema",
    "fp8e4m3-token",
    "nvfp4",
    "mxfp8e4m3",
    "nf4-g16",
    "int16-token",
]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_weight_only(compare, weight):
    compare(nn.Linear(32, 16), weight, torch.randn(6, 32))


@pytest.mark.parametrize("input", INPUTS)
def test_input_and_weight(compare, input):
    pair = compare(nn.Linear(32, 16), {"weight": "int4-g16", "input": input}, torch.randn(2, 6, 32))
    assert pair.layer.quantizer("input") is not None


@pytest.mark.parametrize("input", ["int8-token", "int8-tensor-lsq"])
def test_input_only(compare, input):
    compare(nn.Linear(32, 16), {"input": input}, torch.randn(6, 32))


@pytest.mark.parametrize("weight", ["int4-g16", "int4-lsq", "nvfp4", "int8-asym"])
@pytest.mark.parametrize("input", [None, "int8-token", "int8-tensor-lsq", "int8-asym-token"])
@pytest.mark.parametrize("kind", ["float64", "bfloat16", "autocast"])
def test_dtypes(compare, weight, input, kind):
    autocast = kind == "autocast"
    dtype = torch.float32 if autocast else getattr(torch, kind)
    x = torch.randn(3, 5, 32, dtype=dtype)
    compare(nn.Linear(32, 16, dtype=dtype), {"weight": weight, "input": input}, x, autocast=autocast)


def test_autocast_gives_the_parameters_float32_gradients(compare):
    pair = compare(nn.Linear(32, 16), {"weight": "int4-lsq", "input": "int8-token"}, torch.randn(4, 32), autocast=True)
    assert {p.grad.dtype for p in pair.layer.parameters()} == {torch.float32}


def test_autocast_leaves_float64_alone_as_it_does_for_the_plain_layer(compare):
    pair = compare(nn.Linear(32, 16).double(), "int4-g16", torch.randn(4, 32).double())
    with torch.autocast("cpu", torch.bfloat16):
        assert pair.layer(torch.randn(4, 32).double()).dtype == torch.float64


@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 5, 32), (2, 3, 5, 32)])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(32, 16), lambda: Conv1D(16, 32)], ids=["Linear", "Conv1D"])
def test_any_number_of_dimensions(compare, layer, shape):
    compare(layer(), {"weight": "int4-g16", "input": "int8-token"}, torch.randn(shape))


@pytest.mark.parametrize("weight", ["int4-g16", "int8-asym", "int4-lsq", "nvfp4", "int4-b8x16"])
@pytest.mark.parametrize("input", [None, "int8-token", "int8-tensor-lsq"])
def test_transposed_linear(compare, weight, input):
    compare(Conv1D(16, 32), {"weight": weight, "input": input}, torch.randn(2, 5, 32))


@pytest.mark.parametrize("frozen", [("weight",), ("x",), ("weight", "bias"), ("bias",), ("x", "bias")])
@pytest.mark.parametrize("scheme", [("int4-g16", "int8-token"), ("int4-lsq", "int8-tensor-lsq"), ("int4-clip", None)])
def test_frozen_operands(compare, scheme, frozen):
    compare(nn.Linear(32, 16), {"weight": scheme[0], "input": scheme[1]}, torch.randn(4, 32), frozen=frozen)


def test_no_bias(compare):
    compare(nn.Linear(32, 16, bias=False), {"weight": "int4-g16", "input": "int8-token"}, torch.randn(4, 32))


@pytest.mark.parametrize("output", ["int8-token", "int4-token-clip", "fp8e4m3-tensor", "int8-g8"])
def test_output_quantizer(compare, output):
    compare(nn.Linear(32, 16), {"weight": "int4-g16", "output": output}, torch.randn(2, 5, 32))


def test_strided_input(compare):
    compare(nn.Linear(32, 16), {"weight": "int4-g16", "input": "int8-token"}, torch.randn(32, 6).t())


@pytest.mark.parametrize("input", [None, "int8-token", "int8-tensor-lsq"])
def test_empty_batch(pair, input):
    pair = pair(nn.Linear(32, 16), {"weight": "int4-lsq", "input": input}, torch.randn(4, 32))
    x = torch.randn(0, 32, requires_grad=True)
    y = pair.layer(x)
    y.sum().backward()
    assert y.shape == (0, 16)
    assert x.grad.shape == x.shape
    # every parameter takes part in every step's graph, as DDP requires
    assert all(p.grad is not None and not p.grad.any() for p in pair.layer.parameters())


def test_used_twice_in_one_forward_pass_and_accumulated(pair):
    pair = pair(nn.Linear(16, 16), {"weight": "int4-lsq", "input": "int8-tensor-lsq"}, torch.randn(4, 16))
    for _ in range(2):
        x = torch.randn(4, 16)
        pair.layer(pair.layer(x).tanh()).square().sum().backward()
        pair.composed(pair.composed(x).tanh()).square().sum().backward()
    for name, ours, theirs in pair.leaves():
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)


@settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the autouse seed
)
@given(
    rows=st.integers(1, 9),
    columns=st.sampled_from([8, 16, 24]),
    batch=st.lists(st.integers(1, 3), max_size=3),
    weight=st.sampled_from([*WEIGHTS[:4], "int4-tensor", "int5-p99"]),
    input=st.sampled_from([None, *INPUTS[:2], "int8-tensor-lsq"]),
    bias=st.booleans(),
    transposed=st.booleans(),
)
def test_any_shape(compare, rows, columns, batch, weight, input, bias, transposed):
    if ("g16" in weight and columns % 16) or "b8" in weight:
        weight = "int4-g8"
    layer = Conv1D(rows, columns) if transposed else nn.Linear(columns, rows, bias=bias)
    compare(layer, {"weight": weight, "input": input}, torch.randn(*batch, columns))


@pytest.mark.parametrize("shape", [(16,), (4, 16), (2, 3, 16)])
@pytest.mark.parametrize("enabled", [True, False])
def test_outputs_may_be_worked_on_in_place(pair, shape, enabled):
    pair = pair(nn.Linear(16, 16), {"weight": "int4-lsq", "input": "int8-token"}, torch.randn(shape))
    for quantizer in [*dict(pair.layer.quantizers()).values(), *pair.quantizers.values()]:
        quantizer.enabled = enabled
    x = torch.randn(shape)
    nn.ReLU(inplace=True)(pair.layer(x)).sum().backward()
    pair.composed(x).relu().sum().backward()
    torch.testing.assert_close(pair.layer.weight.grad, pair.plain.weight.grad)


def test_the_plain_layers_keyword_is_kept(pair):
    x = torch.randn(4, 16)
    pair = pair(nn.Linear(16, 8), "int4", x)
    assert torch.equal(pair.layer(input=x), pair.layer(x))


def test_mixed_dtypes_are_the_error_they_are_for_the_plain_layer(pair):
    x = torch.randn(4, 16)
    pair = pair(nn.Linear(16, 8), {"weight": "int4", "input": "int8-token"}, x)
    for layer in (pair.plain, pair.layer):
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x.bfloat16())


def test_bypassed_it_is_the_plain_layer_bit_for_bit(pair):
    for plain in (nn.Linear(32, 16), nn.Linear(32, 16, dtype=torch.bfloat16), Conv1D(16, 32)):
        x = torch.randn(3, 5, 32, dtype=plain.weight.dtype)
        converted = pair(plain, {"weight": "int4-lsq", "input": "int8-tensor-lsq", "output": "int8-token"}, x).layer
        for _, quantizer in converted.quantizers():
            quantizer.enabled = False
        y = converted(x)
        plain(x).sum().backward()
        y.sum().backward()
        assert torch.equal(y, plain(x))
        assert torch.equal(converted.weight.grad, plain.weight.grad)
        scales = [p for n, p in converted.named_parameters() if "quantizer" in n]
        assert len(scales) == 2
        assert all(p.grad is not None and not p.grad.any() for p in scales)


@pytest.mark.parametrize("disabled", ["input", "weight"])
def test_one_of_two_quantizers_bypassed(compare, pair, disabled):
    x = torch.randn(4, 32)
    both = {"weight": "int4-lsq", "input": "int8-tensor-lsq"}
    pair = pair(nn.Linear(32, 16), both, x)
    pair.layer.quantizer(disabled).enabled = pair.quantizers[disabled].enabled = False
    pair.layer(x).square().sum().backward()
    pair.composed(x).square().sum().backward()
    for name, ours, theirs in pair.leaves():
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_converted_layers_may_be_deepcopied_and_differ(pair):
    layer = pair(nn.Linear(16, 8), "int4-lsq", torch.randn(4, 16)).layer
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.quantizer("weight").scale.value.mul_(2)
    x = torch.randn(4, 16)
    assert not torch.equal(layer(x), twin(x))
