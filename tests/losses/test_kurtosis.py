"""Kurtosis of known distributions, its gradient against autograd of the plain formula, and its precision."""

import pytest
import torch

from qlightning.losses import Kurtosis


def naive(y, eps):
    c = y - y.mean(-1, keepdim=True)
    return c.pow(4).mean(-1) / (c.square().mean(-1).square() + eps)


def test_known_distributions():
    generator = torch.Generator().manual_seed(0)
    tokens = Kurtosis(reduction="tokens")
    assert float(tokens(torch.randn(50, 40_000, generator=generator))) == pytest.approx(3, abs=0.01)
    assert float(tokens(torch.rand(50, 40_000, generator=generator))) == pytest.approx(1.8, abs=0.005)
    assert float(tokens(torch.tensor([1.0, -1.0]).repeat(5, 8))) == 1
    outlier = torch.zeros(1, 100)
    outlier[0, 3] = 1
    assert float(tokens(outlier)) == pytest.approx(98.01, rel=1e-3)  # n - 2 + 1/(n-1)
    assert float(tokens(torch.ones(2, 8))) == 0


def test_scale_and_shift_do_not_matter():
    y = torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    k = Kurtosis()
    assert torch.allclose(k.per_token(y), k.per_token(50 * y - 7), rtol=1e-9)


@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_gradient(eps):
    generator = torch.Generator().manual_seed(2)
    y = torch.randn(3, 4, 16, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    each, expected = Kurtosis(eps=eps).per_token(y), naive(y, eps)
    assert torch.allclose(each, expected, rtol=1e-12)
    (grad,), (wanted,) = (torch.autograd.grad((one * weights).sum(), y) for one in (each, expected))
    assert torch.allclose(grad, wanted, rtol=1e-10, atol=1e-14)
    assert torch.autograd.gradcheck(Kurtosis(eps=eps).per_token, y)


def test_reductions():
    y = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(Kurtosis()(y), naive(y, 1e-12).sum())
    assert torch.allclose(Kurtosis(reduction="tokens")(y), naive(y, 1e-12).mean())


def test_low_precision_is_computed_in_float32():
    y = (300 * torch.randn(4, 256, generator=torch.Generator().manual_seed(4))).half().requires_grad_()
    value = Kurtosis()(y)  # 300^4 is beyond float16
    assert value.dtype == torch.float32
    assert torch.equal(value, Kurtosis()(y.float()))
    value.backward()
    assert y.grad.dtype == torch.float16
    assert torch.isfinite(y.grad).all()
    assert torch.isnan(Kurtosis()(torch.tensor([[1.0, float("nan")]])))


def test_only_the_output_itself_is_kept():
    y, saved = torch.randn(4, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        Kurtosis().per_token(y)
    assert [x.data_ptr() for x in saved] == [y.data_ptr()]
