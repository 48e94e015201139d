"""Clamp and compensate: what is quantized, what passes, and which values are ranked together."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from qlightning import convert
from qlightning.layers.swap import convert_like
from qlightning.numerics import DGE, ClampCompensate, Float, PerToken, Quantizer, Stochastic, parse
from qlightning.numerics.spec import describe, rebuild


def with_outliers(*shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(*shape)
    x[0, 1], x[2, 3] = 40.0, -60.0
    return x


@pytest.mark.parametrize("over", ["tensor", "channel", "token"])
def test_the_quantiles_are_those_of_numpy(over) -> None:
    """Elements of x: the inverted distribution function, from above and from below."""
    x = with_outliers(50, 40)
    lowest, highest, *_ = ClampCompensate("fp4e2m1-token", alpha=0.9, over=over).grid(x)
    axis = {"tensor": None, "channel": 0, "token": 1}[over]
    expected = np.quantile(x.numpy(), 0.9, axis=axis, method="inverted_cdf", keepdims=axis is not None)
    np.testing.assert_array_equal(highest.numpy().squeeze(), expected.squeeze())
    expected = -np.quantile(-x.numpy(), 0.9, axis=axis, method="inverted_cdf", keepdims=axis is not None)
    np.testing.assert_array_equal(lowest.numpy().squeeze(), expected.squeeze())


@pytest.mark.parametrize("over", ["tensor", "channel", "token"])
def test_it_is_the_formula(over) -> None:
    x = with_outliers(50, 40)
    quantizer = ClampCompensate("fp4e2m1-token", alpha=0.95, over=over)
    lowest, highest, *_ = quantizer.grid(x)
    bulk = torch.minimum(torch.maximum(x, lowest), highest)
    assert torch.equal(quantizer(x), parse("fp4e2m1-token")(bulk) + (x - bulk))
    alone = ClampCompensate("fp4e2m1-token", alpha=0.95, over=over, residual="none")
    assert torch.equal(alone(x), parse("fp4e2m1-token")(bulk))


def test_clamped_elements_come_back_up_to_the_grid_error_of_the_clamp() -> None:
    x = with_outliers(50, 40)
    quantizer = ClampCompensate("fp4e2m1-tensor", alpha=0.99)
    lowest, highest, *_ = quantizer.grid(x)
    clamped = (x < lowest) | (x > highest)
    ends = torch.stack([lowest, highest]).flatten()
    error = (parse("fp4e2m1-tensor")(ends) - ends).abs().max()  # both share the scale of the larger one
    assert 0 < int(clamped.sum()) <= 2 * 0.01 * x.numel()
    assert float((quantizer(x) - x)[clamped].abs().max()) <= float(error) + 1e-5
    worse = (parse("fp4e2m1-tensor")(x) - x).square().mean()
    assert float((quantizer(x) - x).square().mean()) < 0.1 * float(worse)


@pytest.mark.parametrize("over", ["tensor", "channel", "token"])
def test_at_alpha_one_nothing_is_clamped(over) -> None:
    x = with_outliers(50, 40)
    quantizer = ClampCompensate("fp4e2m1-token", alpha=1, over=over)
    assert torch.equal(quantizer(x), parse("fp4e2m1-token")(x))


@pytest.mark.parametrize("residual", ["exact", "none"])
def test_gradients_pass_straight_through(residual) -> None:
    x, grad = with_outliers(8, 32).requires_grad_(), torch.randn(8, 32)
    (got,) = torch.autograd.grad(ClampCompensate("fp4e2m1-token", residual=residual)(x), x, grad)
    assert torch.equal(got, grad)


def test_another_rule_holds_between_the_quantiles_and_the_identity_outside() -> None:
    x, grad = with_outliers(8, 32), torch.randn(8, 32)
    inner = Quantizer(Float(2, 1), PerToken(), gradient=DGE())
    quantizer = ClampCompensate(inner, alpha=0.9)
    lowest, highest, *_ = quantizer.grid(x)
    leaf, bulk = x.clone().requires_grad_(), x.clamp(lowest, highest).requires_grad_()
    (got,) = torch.autograd.grad(quantizer(leaf), leaf, grad)
    (expected,) = torch.autograd.grad(inner(bulk), bulk, grad)
    outside = (x < lowest) | (x > highest)
    assert torch.equal(got[outside], grad[outside])
    assert torch.equal(got[~outside], expected[~outside])


def test_in_bfloat16_the_sum_is_rounded_once() -> None:
    x = with_outliers(8, 32).bfloat16()
    quantizer = ClampCompensate("fp4e2m1-token", alpha=0.9)
    lowest, highest, *_ = quantizer.grid(x)
    bulk = x.clamp(lowest, highest)
    exact = parse("fp4e2m1-token")(bulk).float() + (x.float() - bulk.float())
    assert torch.equal(quantizer(x), exact.bfloat16())


def test_a_ramp_and_stochastic_rounding_are_the_quantizers() -> None:
    x = with_outliers(8, 32)
    quantizer = ClampCompensate(Quantizer(Float(2, 1), PerToken(), rounding=Stochastic(seed=3)))
    first = quantizer(x)
    quantizer.rounding.advance()
    assert not torch.equal(quantizer(x), first)
    quantizer.eval()
    deployed = quantizer(x)
    assert torch.equal(deployed, ClampCompensate("fp4e2m1-token")(x))
    quantizer.train().set_strength(0.25)
    assert torch.allclose(
        quantizer(x),
        x
        + 0.25
        * (
            copy.deepcopy(quantizer.quantizer)(x.clamp(*quantizer.grid(x)[:2]))
            + (x - x.clamp(*quantizer.grid(x)[:2]))
            - x
        ),
    )


def test_a_layer_runs_it_and_a_checkpoint_describes_it() -> None:
    x = with_outliers(8, 32)
    model, other = nn.Sequential(nn.Linear(32, 16)), nn.Sequential(nn.Linear(32, 16))
    convert(model, {"*": {"weight": "fp4e2m1", "input": ClampCompensate("fp4e2m1-token", alpha=0.9)}})
    layer = model[0]
    y = layer(x)
    assert torch.equal(
        y, nn.functional.linear(layer.input_quantizer(x), layer.weight_quantizer(layer.weight), layer.bias)
    )
    y.sum().backward()
    assert torch.equal(layer.weight.grad, torch.ones(16, 8) @ layer.input_quantizer(x))
    convert_like(other, model.state_dict())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), y)
    assert rebuild(describe(layer.input_quantizer)) == layer.input_quantizer
    assert not layer.input_quantizer.deploys_like(ClampCompensate("fp4e2m1-token", alpha=0.95))


def test_bytes_are_the_quantizers_and_those_of_the_outliers() -> None:
    quantizer = ClampCompensate("fp4e2m1-tensor", alpha=0.99)
    assert quantizer.stored_bytes((100, 100), torch.bfloat16) == 5000 + 2 + 200 * (2 + 4)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"alpha": 0.4}, "above 0.5"),
        ({"over": "row"}, "'tensor', 'channel' or 'token'"),
        ({"residual": "sparse"}, "'exact' or 'none'"),
        ({"quantizer": "int8-tensor-ema"}, "its scale must too"),
    ],
)
def test_wrong_arguments_are_refused(arguments, why) -> None:
    with pytest.raises(ValueError, match=why):
        ClampCompensate(**{"quantizer": "fp4e2m1-token"} | arguments)
