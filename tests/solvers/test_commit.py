"""What a solution does to its layer (both kinds of commit in a whole model: test_engine.py)."""

import pytest
import torch
from torch import nn

from qlightning.capture import sites_of
from qlightning.layers.convert import convert
from qlightning.numerics import Int, PerGroup, Quantizer
from qlightning.solvers.commit import commit, rounded
from qlightning.solvers.fixed import fix_scales
from qlightning.solvers.solver import SiteSolution
from qlightning.transforms.hadamard import RandomHadamard


@pytest.fixture
def site():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 6))
    convert(model, "int3-g8")
    fix_scales(model)
    return sites_of(model)[0]


def test_a_residual_keeps_the_codes_and_what_is_below_a_step(site):
    weight, step = site.weight.clone(), site.quantizer.grid(site.weight).step.repeat_interleave(8, 1).reshape(6, 32)
    values = rounded(site.quantizer, weight + 0.8 * step)
    commit(site, SiteSolution(values), "residual")
    assert torch.equal(rounded(site.quantizer, site.weight), values)
    wanted = values + (weight - values).clamp(-0.49 * step, 0.49 * step)
    torch.testing.assert_close(site.weight, wanted)


def test_values_off_the_grid_switch_the_quantizer_off(site):
    values = torch.randn(6, 32)
    commit(site, SiteSolution(values, on_grid=False), "values")
    assert torch.equal(site.weight, values)
    assert not site.quantizer.enabled


def test_values_that_should_be_on_the_grid_must_be(site):
    with pytest.raises(ValueError, match=r"0: the solution is not on the grid.*fewer bits"):
        commit(site, SiteSolution(torch.randn(6, 32)), "values")


def test_a_residual_in_a_basis_of_its_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 6))
    convert(model, Quantizer(Int(3), PerGroup(8), transform=RandomHadamard(16)))
    fix_scales(model)
    site = sites_of(model)[0]
    weight, values = site.weight.clone(), rounded(site.quantizer, site.weight * 1.3)
    commit(site, SiteSolution(values), "residual")
    assert torch.equal(rounded(site.quantizer, site.weight), values)
    assert float((site.weight - weight).norm()) < 0.7 * float((values - weight).norm())
