"""DGE against the numbers and the curve of the paper."""

import itertools

import pytest
import torch

from qlightning.numerics import DGE, Float, Int, PerChannel, Quantizer, parse
from qlightning.numerics.spec import describe, rebuild

E2M1 = Float(2, 1)
GRID = sorted(set(E2M1.values()))


def slope(v: torch.Tensor, *, k: float = 5.0, clamp: float = 3.0) -> torch.Tensor:
    return DGE(k=k, clamp=clamp).slope(v, v, E2M1)


def test_the_slopes_of_the_released_operator() -> None:
    expected = [0.2, 0.4446, 0.5819, 0.2186, 2.1088, 0.2709, 0.3097, 0.2709, 0.2416, 0.5819]
    got = slope(torch.linspace(-6, 6, 20))
    assert [round(value, 4) for value in got.tolist()] == expected + expected[::-1]


def test_at_representable_values_the_slope_is_one_over_k() -> None:
    assert len(GRID) == 15
    for k in (1.0, 2.0, 5.0):
        assert torch.equal(slope(torch.tensor(GRID), k=k), torch.full((15,), 1 / k))


def test_outside_of_the_range_it_is_zero_and_in_the_middle_it_is_the_limit() -> None:
    assert slope(torch.tensor([-6.01, 6.01, 1e30, -float("inf")])).tolist() == [0.0] * 4
    middles = torch.tensor([(lo + hi) / 2 for lo, hi in itertools.pairwise(GRID)])
    assert torch.equal(slope(middles), torch.full((14,), 3.0))
    assert torch.equal(slope(middles, clamp=7.0), torch.full((14,), 7.0))
    assert slope(torch.tensor([float("nan")])).item() == 0.0


def test_it_is_the_derivative_of_the_papers_curve() -> None:
    """f goes through lo and hi, and autograd of f is the slope wherever that is below the limit."""
    v = (torch.rand(4000, dtype=torch.float64) * 12 - 6).requires_grad_()
    grid = torch.tensor(GRID, dtype=torch.float64)
    below = torch.bucketize(v.detach(), grid, right=True) - 1
    lo, hi = grid[below], grid[below + 1]
    t = 2 * (v - lo) / (hi - lo) - 1
    f = lo + (hi - lo) / 2 * (1 + t.sign() * t.abs() ** (1 / 5))
    (expected,) = torch.autograd.grad(f.sum(), v)
    got = slope(v.detach().float()).double()
    assert torch.allclose(got, expected.clamp(max=3), atol=1e-3)
    ends = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
    assert torch.equal(grid[:-1, None] + (grid.diff() / 2)[:, None] * (1 + ends), grid.unfold(0, 2, 1))


def test_the_curve_meets_every_representable_value() -> None:
    """f(lo) = lo and f(hi) = hi: without the limit, the slope over an interval adds up to its length.

    The middle, where the slope is infinite, is left out: f rises there by a tenth of the interval.
    """
    edges = torch.linspace(0.1, 1, 1001, dtype=torch.float64)
    middles, width = (edges[1:] + edges[:-1]) / 2, edges.diff()
    for lo, hi in itertools.pairwise(GRID):
        half = (hi - lo) / 2
        risen = 0.0
        for sign in (-1, 1):
            v = (lo + hi) / 2 + half * sign * middles**5  # close where the slope is steep
            risen += float((slope(v.float(), clamp=1e30).double() * half * 5 * middles**4 * width).sum())
        assert risen == pytest.approx(0.9 * (hi - lo), rel=1e-3)


def test_the_limit_takes_the_mean_slope_from_one_to_059() -> None:
    v = torch.linspace(-5.9999, 5.9999, 400_001)
    assert float(slope(v).mean()) == pytest.approx(0.594, abs=2e-3)
    assert torch.equal(slope(v, k=1), torch.ones_like(v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_gradient_is_that_of_the_quantized_one_times_the_slope_at_the_scaled_weight(dtype) -> None:
    w = torch.randn(4, 32).to(dtype).requires_grad_()
    quantizer = Quantizer(E2M1, PerChannel(), gradient=DGE())
    grad = torch.randn(4, 32).to(dtype)
    (got,) = torch.autograd.grad(quantizer(w), w, grad)
    step = (w.detach().float().abs().amax(1, keepdim=True) / 6).to(dtype).float()
    assert torch.equal(got, (grad.float() * slope(w.detach().float() / step)).to(dtype))


def test_it_works_in_any_format() -> None:
    v = torch.tensor([-8.0, -7.9, 0.5, 7.0, 7.1])
    expected = [0.2, 0.2 * 0.8**-0.8, 3.0, 0.2, 0.0]
    assert torch.allclose(DGE().slope(v, v, Int(4)), torch.tensor(expected), atol=1e-4)


def test_it_is_described_in_checkpoints() -> None:
    quantizer = Quantizer(E2M1, PerChannel(), gradient=DGE(k=3))
    assert rebuild(describe(quantizer)) == quantizer
    assert not quantizer.trains_like(parse("fp4e2m1"))
    assert quantizer.deploys_like(parse("fp4e2m1"))


@pytest.mark.parametrize("arguments", [{"k": 0.5}, {"clamp": 0.0}])
def test_wrong_arguments_are_refused(arguments) -> None:
    with pytest.raises(ValueError, match="for example DGE"):
        DGE(**arguments)
