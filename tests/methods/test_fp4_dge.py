"""FP4 training against its formulas. The estimator and the clamp themselves: numerics/test_{dge,compensate}.py."""

import pytest
import torch
from torch import nn

from qlightning import convert
from qlightning.methods import FP4Training
from qlightning.numerics import Float

GRID = torch.tensor(sorted(set(Float(2, 1).values())))


def layer(method: FP4Training) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16))
    convert(model, {"*": {key: value for key, value in method.quantization().items() if key != "start"}})
    return model[0]


def nearest(v: torch.Tensor) -> torch.Tensor:
    """The nearest value of the grid, by distance to all of them."""
    return GRID[(v[..., None] - GRID).abs().argmin(-1)]


def test_weights_have_a_scale_per_channel_and_the_gradient_of_the_estimator() -> None:
    """Wq = E2M1(W s) / s with s = 6 / absmax of the row; dW = dWq f'(W s)."""
    linear, x, grad = layer(FP4Training(alpha=1)), torch.randn(8, 32), torch.randn(8, 16)
    w = linear.weight.detach()
    s = 6 / w.abs().amax(1, keepdim=True)
    q_w, q_x = linear.weight_quantizer(w), linear.input_quantizer(x)
    assert torch.allclose(q_w, nearest(w * s) / s, atol=1e-6)
    t = 6 / x.abs().amax(1, keepdim=True)
    assert torch.allclose(q_x, nearest(x * t) / t, atol=1e-6)
    linear(x).backward(grad)
    straight = grad.t() @ q_x
    v = w * s
    below = (torch.bucketize(v, GRID, right=True) - 1).clamp(0, 13)
    position = 2 * (v - GRID[below]) / (GRID[below + 1] - GRID[below]) - 1
    slope = (position.abs() ** (1 / 5 - 1) / 5).clamp(max=3.0)
    assert torch.allclose(linear.weight.grad, straight * slope, rtol=1e-3, atol=1e-5)


def test_inputs_are_clamped_and_compensated() -> None:
    """Y = (Q4(Xc) + dX) Q4(W)^T; with alpha = 1 nothing is clamped, without the residual the outlier is lost."""
    x = torch.randn(8, 32)
    x[2, 5] = 50.0
    full, clamped, plain = FP4Training(), FP4Training(residual="none"), FP4Training(alpha=1)
    error = {}
    for name, method in (("full", full), ("clamped", clamped), ("plain", plain)):
        linear = layer(method)
        error[name] = float((linear.input_quantizer(x) - x).norm())
        assert torch.equal(
            linear(x),
            nn.functional.linear(linear.input_quantizer(x), linear.weight_quantizer(linear.weight), linear.bias),
        )
    assert error["full"] < error["plain"] < error["clamped"]
    assert not hasattr(plain.quantization()["input"], "alpha")


def test_the_input_s_gradient_passes_straight_through() -> None:
    linear, x, grad = layer(FP4Training()), torch.randn(8, 32).requires_grad_(), torch.randn(8, 16)
    linear(x).backward(grad)
    assert torch.equal(x.grad, grad @ linear.weight_quantizer(linear.weight).detach())


@pytest.mark.parametrize(("ties", "expected"), [("even", [0.0, 1.0, 2.0, 0.0]), ("up", [0.5, 1.0, 2.0, 0.0])])
def test_ties_are_resolved_as_asked(ties, expected) -> None:
    weight = FP4Training(ties=ties).quantization()["weight"]
    assert weight(torch.tensor([[0.25, 0.75, 1.75, -0.25, 6.0]])).tolist() == [[*expected, 6.0]]


def test_arms_of_the_ablation() -> None:
    assert FP4Training(gradient="ste").quantization()["weight"].gradient.identity
    tensor = FP4Training(granularity="tensor", alpha=1).quantization()
    x = torch.randn(4, 32)
    for quantizer in (tensor["weight"], tensor["input"]):
        assert torch.allclose(quantizer(x), nearest(x * 6 / x.abs().max()) * x.abs().max() / 6, atol=1e-6)
