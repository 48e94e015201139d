"""The lattice is the quantizer's arithmetic, entry by entry."""

import pytest
import torch

from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.spec import parse
from qlightning.solvers import GPTQ, LDLQ, Moments
from qlightning.solvers.incoherence import Incoherence
from qlightning.solvers.lattice import Lattice, in_basis
from qlightning.transforms.hadamard import RandomHadamard

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
    assert torch.equal(lattice.values(lattice.nearest(weight, slice(None), slice(None))).to(dtype), wanted)
    columns = torch.tensor([7, 3, 31])
    part = lattice.nearest(weight[2:5, columns], slice(2, 5), columns)
    assert torch.equal(part.to(dtype), wanted[2:5, columns])
    assert not part.requires_grad


BASES = {"columns": RandomHadamard(16, seed=1), "both": Incoherence(seed=1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("basis", BASES)
def test_a_quantizer_in_a_basis_of_its_own(small, basis, dtype):
    """The lattice is the quantizer, and solvers gain there too and stay on the grid."""
    weight, x = small.problem(rows=24, columns=32, tokens=256)
    weight = weight.to(dtype)
    for spec in ("int2-learned", "int3-g8-learned", "int4-asym-learned"):
        plain = parse(spec)
        quantizer = Quantizer(plain.format, plain.granularity, scale=plain.scale, transform=BASES[basis]).eval()
        quantizer.build((24, 32))
        quantizer.initialize(weight)
        lattice, wanted = Lattice(quantizer, weight), quantizer(weight).detach()
        everything = lattice.nearest(lattice.weight, slice(None), slice(None))
        assert torch.equal(lattice.values(everything).to(dtype), wanted)
        moments = Moments((x.T @ x).double()[None], len(x))
        for solver in (GPTQ(order="activation"), LDLQ(greedy=1)):
            solution = solver.solve(weight, moments, quantizer=quantizer, generator=torch.Generator())
            values = solution.values.to(dtype)
            assert torch.equal(quantizer(values).detach(), values)
            assert moments.loss(values - weight) < 0.9 * moments.loss(wanted - weight)


def test_the_loss_is_the_same_in_every_basis(small):
    weight, x = small.problem(rows=24, columns=32)
    hessian = (x.T @ x).double()
    exact = float((weight.double() @ hessian * weight.double()).sum())
    for basis in BASES.values():
        turned = basis(weight).double()
        assert float((turned @ in_basis(basis, hessian) * turned).sum()) == pytest.approx(exact, rel=1e-5)


def test_what_mixes_channels_does_not_fit_grouped_convolutions():
    quantizer = Quantizer(parse("int4").format, transform=Incoherence())
    lattice = Lattice(quantizer, torch.randn(4, 16))
    with pytest.raises(ValueError, match="mixes output channels"):
        lattice.hessians(torch.eye(16).repeat(2, 1, 1))


def test_a_composite_is_refused():
    class Elsewhere:
        """Not a plain Quantizer."""

    with pytest.raises(ValueError, match="entry by entry"):
        Lattice(Elsewhere(), torch.ones(2, 2))  # type: ignore[arg-type]
