"""Rounding to nearest is what the quantizer does (through the engine: test_engine.py)."""

import pytest
import torch

from qlightning.numerics.spec import parse
from qlightning.solvers import RTN, Moments


@pytest.mark.parametrize("spec", ["int4-g8", "int4-asym", "binary", "fp4e2m1", "mxfp4", "nvfp4"])
def test_it_is_the_quantizer(spec):
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    quantizer = parse(spec)
    quantizer.build((6, 32))
    solution = RTN().solve(weight, Moments(torch.eye(32)[None]), quantizer=quantizer, generator=torch.Generator())
    assert torch.equal(solution.values, quantizer(weight))
    assert solution.on_grid
