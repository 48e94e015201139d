"""The lattice is the quantizer's arithmetic, entry by entry."""

import pytest
import torch

from qlightning.numerics.spec import parse
from qlightning.solvers.lattice import Lattice

SPECS = [
    *("int3", "int4-g8", "int4-g8-asym", "int4-tensor", "int4-lsq", "int4-g8-asym-learned", "int4-b2x4", "ternary"),
    *("binary", "nf4-g8", "log4", "fp4e2m1", "fp8e4m3", "nvfp4", "mxfp4", "int4-sr", "int8-sbf16", "int4-mse"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS)
def test_rounding_everything_is_the_quantizer(spec, dtype):
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    quantizer = parse(spec).eval()
    quantizer.build((6, 32))
    quantizer.initialize(weight)
    lattice, wanted = Lattice(quantizer, weight), quantizer(weight).detach()
    assert torch.equal(lattice.nearest(weight, slice(None), slice(None)).to(dtype), wanted)
    columns = torch.tensor([7, 3, 31])
    part = lattice.nearest(weight[2:5, columns], slice(2, 5), columns)
    assert torch.equal(part.to(dtype), wanted[2:5, columns])
    assert not part.requires_grad


def test_a_quantizer_in_another_basis_is_refused():
    class Elsewhere:
        """Not a plain Quantizer."""

    with pytest.raises(ValueError, match="entry by entry"):
        Lattice(Elsewhere(), torch.ones(2, 2))  # type: ignore[arg-type]
