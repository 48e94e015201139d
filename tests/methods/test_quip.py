"""QuIP as a method: its grid, and that LDLQ in the rotated basis pays. The solver: tests/solvers/test_quip.py."""

import pytest
import torch
from torch import nn

from qlightning import convert
from qlightning.methods import QuIP
from qlightning.methods.quip import RMS
from qlightning.solvers import RTN, calibrate, fix_scales
from qlightning.solvers.incoherence import Incoherence


@pytest.mark.parametrize("bits", [2, 3])
def test_the_grid_is_uniform_within_2_4_root_mean_squares(bits: int) -> None:
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    quantizer = QuIP(bits).quantization()["weight"]
    values = Incoherence()(quantizer(weight)).unique()
    reach = 2.4 * weight.square().mean().sqrt()
    levels = torch.linspace(-1, 1, 2**bits) * reach
    nearest = (values[:, None] - levels).abs().min(1)
    assert float(nearest.values.max()) < 1e-5
    assert len(nearest.indices.unique()) == 2**bits


def outliers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 24))
    with torch.no_grad():
        model[0].weight *= torch.where(torch.rand(24, 32) < 0.03, 20.0, 1.0)
    return model


def test_ldlq_in_the_basis_beats_rounding_in_either_basis() -> None:
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(1)) @ torch.randn(32, 32)
    exact, errors = outliers()(x).detach(), {}
    asked = QuIP(2, batches=1).quantization()
    for name, weight, solver in (
        ("plain", "int2-tensor", RTN()),
        ("basis", asked["weight"], RTN()),
        ("quip", asked["weight"], asked["init"]),
    ):
        model = outliers()
        convert(model, weight)
        calibrate(model, [x], solver)
        quantizer = model[0].quantizer("weight")
        assert torch.equal(quantizer(model[0].weight), model[0].weight)
        errors[name] = float((model(x).detach() - exact).square().mean() / exact.square().mean())
    assert errors["quip"] < 0.8 * errors["basis"], errors
    assert errors["quip"] < 0.9 * errors["plain"], errors


def test_gradients_reach_the_weight_through_the_basis() -> None:
    model = outliers()
    convert(model, QuIP(2).quantization()["weight"])
    fix_scales(model)
    grad = torch.randn(24, 32)
    model[0].quantizer("weight")(model[0].weight).backward(grad)
    assert model[0].weight.grad is not None
    torch.testing.assert_close(model[0].weight.grad, grad, rtol=1e-4, atol=1e-5)  # straight-through: U^T U g V^T V


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="RMS"):
        RMS(rho=0)
