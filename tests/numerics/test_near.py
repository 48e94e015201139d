"""The mask of confidence-guided annealing as a gradient."""

import pytest
import torch

from qlightning.numerics import LSQ, STE, AbsMean, Int, PerChannel, Quantizer
from qlightning.numerics.bins import Bins
from qlightning.numerics.gradients import Gradient
from qlightning.numerics.near import NearThreshold
from qlightning.numerics.spec import describe, rebuild


@pytest.mark.parametrize("boundary", [0.005, 0.1])
def test_only_weights_near_a_threshold_have_a_gradient(boundary: float) -> None:
    """Confident: |u - (i + 1/2)| > BR for every threshold i, u = c n - 1/2 (OFQ)."""
    w = torch.randn(8, 4096, requires_grad=True)
    quantizer = Quantizer(
        Bins(4), PerChannel(), scale=AbsMean(multiplier=2.0), gradient=NearThreshold(STE(), boundary=boundary)
    )
    (found,) = torch.autograd.grad(quantizer(w).sum(), w)
    c = (w / (2 * w.abs().mean(1, keepdim=True))).clamp(-1, 1 - 1e-6)
    u = c * 2 - 0.5
    confident = torch.stack([(u - (i + 0.5)).abs() > boundary for i in (-2, -1, 0)]).all(0)
    assert torch.equal(found == 0, confident)
    assert 0 < (~confident).float().mean() < 0.6
    assert set(found.unique().tolist()) == {0.0, 1.0}


def test_it_is_laid_over_another_gradient() -> None:
    v = torch.tensor([[-9.0, -0.5, 0.2, 0.52, 6.49, 7.5]])
    slope = NearThreshold(LSQ(), boundary=0.05).slope(v, v.round(), Int(4))
    assert slope.tolist() == [[0.0, 1.0, 0.0, 1.0, 1.0, 0.0]]
    assert NearThreshold(LSQ()).scale_factor(64, Int(4)) == LSQ().scale_factor(64, Int(4))
    assert not NearThreshold(STE()).identity


def test_it_is_described_and_its_boundary_checked() -> None:
    gradient: Gradient = NearThreshold(STE(), boundary=0.01)
    assert rebuild(describe(gradient)) == gradient
    with pytest.raises(ValueError, match=r"boundary=0\.005"):
        NearThreshold(STE(), boundary=0.5)
