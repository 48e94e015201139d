"""Learning: Adam's own steps, what is held out, short dtypes; a scale that stands in for a quantizer's own."""

import pytest
import torch
from torch import nn

from qlightning.capture import sites_of
from qlightning.layers.convert import convert
from qlightning.numerics.learned import Learned
from qlightning.solvers.block_ap import StepAndZero
from qlightning.solvers.fixed import fix_scales
from qlightning.solvers.learning import cosine, learn, split, standing_in

GOAL = torch.tensor([1.0, -2.0, 3.0])


def run(x, **options):
    asked = {"batches": 4, "epochs": 3, "held_out": 0.25, "patience": 2, "generator": torch.Generator(), **options}
    return learn([(0.1, [x])], lambda i: ((x.float() - GOAL) * (i + 1)).square().sum(), **asked)


def test_the_steps_are_adams() -> None:
    x, y = torch.zeros(3), torch.zeros(3, requires_grad=True)
    assert run(x, batches=1, epochs=5, floor=0.5) is None
    optimizer = torch.optim.Adam([y], lr=0.1)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.1 * cosine(step / 5, 0.5)
        optimizer.zero_grad()
        (y - GOAL).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(x, y.detach())
    assert not x.requires_grad


def test_the_best_epoch_stays_perhaps_none() -> None:
    near = GOAL.clone()
    assert run(near) is None  # there was no error
    assert torch.equal(near, GOAL)
    x, seen = GOAL + 1e-3, []
    share = learn(
        [(1.0, [x])],
        lambda i: (seen.append(i), (x - GOAL).square().sum())[1],
        **{"batches": 4, "epochs": 50, "held_out": 0.25, "patience": 2, "generator": torch.Generator()},
    )
    assert share <= 1
    assert len(seen) < 100  # it ended early
    assert set(seen) == {0, 1, 2, 3}
    assert float((x - GOAL).square().sum()) <= 3.1e-6


def test_what_is_held_out() -> None:
    assert split(4, 0.25) == ([0, 1, 2], [3])
    assert split(10, 1e-3) == (list(range(9)), [9])
    assert split(1, 0.5) == ([0], [])
    assert split(3, 0.0) == ([0, 1, 2], [])


def test_a_short_dtype_learns_by_its_master() -> None:
    """Steps of 1e-3 are lost in bfloat16 at 1."""
    x = torch.full((3,), 1.0, dtype=torch.bfloat16)
    learn(
        [(1e-3, [x])],
        lambda i: (x.float() - 2).square().sum(),
        **{"batches": 1, "epochs": 20, "held_out": 0.0, "patience": 1, "generator": torch.Generator()},
    )
    assert x.tolist() == pytest.approx([1.02] * 3, abs=0.005)


@pytest.mark.parametrize("spec", ["int3-asym", "int3-asym-learned"])
def test_a_scale_stands_in_and_leaves_its_grid(spec) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4))
    convert(model, spec)
    fix_scales(model)
    (site,) = sites_of(model)
    quantizer, own = site.quantizer, site.quantizer.scale
    quantizer.initialize(site.weight)
    quantizer.enabled = False
    step = StepAndZero(quantizer.grid(site.weight))
    with standing_in(site, step):
        assert quantizer.enabled
        assert quantizer.scale is step
        with torch.no_grad():
            step.step.mul_(1.5)
            step.zero.add_(1)
        values = quantizer(site.weight).detach()
    assert quantizer.scale is own
    assert isinstance(own, Learned) == ("learned" in spec)
    assert not quantizer.enabled
    quantizer.enabled = True
    torch.testing.assert_close(quantizer(site.weight).detach(), values)
