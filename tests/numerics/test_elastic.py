"""ParetoQ's gradients against its formulas, written out value by value."""

import pytest
import torch
from torch import Tensor

from qlightning.numerics import LSQ, STE, AbsMax, AbsMean, Binary, Int, Learned, PerChannel, Quantizer
from qlightning.numerics.bins import Bins
from qlightning.numerics.elastic import ElasticBinary, OverTensor, StretchedElastic
from qlightning.numerics.gradients import Gradient


def gradients(quantizer: Quantizer, w: Tensor, alpha: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    quantizer.build(tuple(w.shape))
    quantizer.initialize(w)
    (step,) = quantizer.learned()
    with torch.no_grad():
        step.copy_(alpha)
    w = w.clone().requires_grad_()
    grad_w, grad_step = torch.autograd.grad(quantizer(w), [w, step], grad)
    return grad_w, grad_step


def case() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 40), torch.rand(6, 1) + 0.5, torch.randn(6, 40)


def test_elastic_binarization() -> None:
    w, alpha, grad = case()
    quantizer = Quantizer(Binary(), PerChannel(), scale=Learned(AbsMean()), gradient=ElasticBinary())
    grad_w, grad_alpha = gradients(quantizer, w, alpha, grad)
    assert torch.equal(grad_w, torch.where((w / alpha).abs() <= 1, grad, 0.0))
    assert torch.allclose(grad_alpha, (grad * w.sign()).sum(1, keepdim=True) / 40**0.5, rtol=1e-5)


@pytest.mark.parametrize(("levels", "beyond", "outside"), [(4, "level", 0.75), (3, "level", 2 / 3), (3, 1.0, 1.0)])
def test_stretched_elastic_quantization(levels: int, beyond: float | str, outside: float) -> None:
    w, alpha, grad = case()
    rule = StretchedElastic(beyond=beyond)  # type: ignore[arg-type]
    quantizer = Quantizer(Bins(levels), PerChannel(), scale=Learned(AbsMax()), gradient=rule)
    grad_w, grad_alpha = gradients(quantizer, w, alpha, grad)
    v = w / alpha
    assert 0.05 < (v.abs() > 0.99).float().mean() < 0.95
    assert torch.equal(grad_w, torch.where(v.abs() <= 0.99, grad, 0.0))
    moved = torch.where(v.abs() <= 0.99, quantizer(w) / alpha - v, outside * v.sign())
    assert torch.allclose(grad_alpha, (grad * moved).sum(1, keepdim=True) / 40**0.5, atol=1e-5)


@pytest.mark.parametrize("rule", [LSQ(), ElasticBinary(), StretchedElastic()], ids=["lsq", "binary", "seq"])
def test_over_the_tensor_only_the_damping_of_the_scale_changes(rule: Gradient) -> None:
    w, alpha, grad = case()
    format = Binary() if isinstance(rule, ElasticBinary) else Bins(4) if isinstance(rule, StretchedElastic) else Int(4)
    one, other = (
        gradients(Quantizer(format, PerChannel(), scale=Learned(), gradient=g), w, alpha, grad)
        for g in (rule, OverTensor(rule))
    )
    assert torch.equal(one[0], other[0])
    assert torch.allclose(one[1] / 6**0.5, other[1])


def test_over_the_tensor_lsq_is_esser_per_row_with_the_count_of_the_matrix() -> None:
    w, alpha, grad = case()
    quantizer = Quantizer(Int(3), PerChannel(), scale=Learned(), gradient=OverTensor(LSQ()))
    _, found = gradients(quantizer, w, alpha, grad)
    v = w / alpha
    inside = (v >= -4) & (v <= 3)
    moved = torch.where(inside, v.round() - v, v.clamp(-4, 3))
    assert torch.allclose(found, (grad * moved).sum(1, keepdim=True) / (240 * 3) ** 0.5, atol=1e-5)


def test_over_the_tensor_asks_for_no_input_where_the_other_does_not() -> None:
    assert OverTensor(STE()).identity
    assert not OverTensor(LSQ()).identity


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="beyond"):
        StretchedElastic(beyond="code")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="edge"):
        StretchedElastic(edge=0)
