"""A scale per token position, for inputs of one length."""

import pytest
import torch

from qlightning.numerics import LSQ, Int, Learned, LSQStep, Quantizer
from qlightning.numerics.per_position import PerPosition
from qlightning.numerics.spec import describe, rebuild


def learned(positions: int) -> Quantizer:
    quantizer = Quantizer(Int(4), PerPosition(positions), scale=Learned(LSQStep()), gradient=LSQ())
    quantizer.build((-1, 8))
    return quantizer


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 3, 5, 8)])
def test_it_is_a_quantizer_per_position(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) * torch.arange(1, 6)[:, None]
    quantizer, grad = learned(5), torch.randn(shape)
    quantizer.initialize(x)
    (step,) = quantizer.learned()
    assert step.shape == (5, 1)
    x.requires_grad_()
    grad_x, grad_step = torch.autograd.grad(quantizer(x), [x, step], grad)
    for position in range(5):
        alone = Quantizer(Int(4), scale=Learned(LSQStep()), gradient=LSQ())
        alone.build((-1, 8))
        here = x.detach()[..., position, :].clone().requires_grad_()
        alone.initialize(here.detach())
        assert torch.allclose(quantizer(x)[..., position, :], alone(here), rtol=1e-6)
        wanted = torch.autograd.grad(alone(here), [here, *alone.learned()], grad[..., position, :])
        assert torch.allclose(grad_x[..., position, :], wanted[0])
        assert torch.allclose(grad_step[position], wanted[1], atol=1e-5)
    assert torch.equal(quantizer.dequantize(quantizer.quantize(x.detach()), x.dtype), quantizer(x))
    assert rebuild(describe(quantizer)) == quantizer


def test_another_length_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"PerPosition\(7\)"):
        learned(5).initialize(torch.randn(2, 7, 8))
    with pytest.raises(ValueError, match=r"PerPosition\(197\)"):
        PerPosition(0)
