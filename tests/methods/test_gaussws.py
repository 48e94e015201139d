"""The checks of the GaussWS card (S95)."""

import math

import pytest
import torch
from torch import Tensor

from qlightning.methods import GaussWS
from qlightning.methods.gaussws import RoundedNormal
from qlightning.numerics import Quantizer


def quantizer(shape: tuple[int, int] = (64, 64), **options: float) -> Quantizer:
    made = GaussWS(**options).quantization()["weight"]
    made.build(shape)
    made.initialize(torch.zeros(shape))
    return made


def noise(n: int = 1 << 20) -> Tensor:
    rounding = RoundedNormal(seed=3)
    return rounding.round(torch.zeros(n), rounding.key())


def test_the_noise_is_a_rounded_half_normal() -> None:
    """Against the normal distribution's own probabilities."""
    r = noise()
    normal = torch.distributions.Normal(0.0, 1.0)
    for value in (-2, -1, 0, 1, 2):
        low, high = (normal.cdf(torch.tensor(2 * value + d, dtype=torch.float64)).item() for d in (-1.0, 1.0))
        expected = high - low
        share = (r == value).double().mean().item()
        assert abs(share - expected) < 5 * math.sqrt(expected / r.numel())
    assert r.double().var().item() == pytest.approx(0.3254, abs=2e-3)
    assert abs(r.mean().item()) < 3e-3


def test_the_weight_is_w_plus_noise_of_the_step() -> None:
    w, q = torch.randn(64, 64), quantizer()
    blocks = w.view(2, 32, 2, 32).abs().amax((1, 3), keepdim=True)
    r = (q(w) - w).view(2, 32, 2, 32) / (blocks * 2.0 ** (1 - 6))
    assert torch.allclose(r, r.round(), atol=2e-3)
    assert set(r.round().flatten().tolist()) <= {-2.0, -1.0, 0.0, 1.0, 2.0}
    assert len(set(r.round().flatten().tolist())) >= 3


def test_the_expected_weight_is_the_weight() -> None:
    w, q = torch.randn(32, 32), quantizer((32, 32))
    total = torch.zeros_like(w)
    for _ in range(400):
        q.rounding.advance()
        total += q(w)
    step = w.abs().max() * 2.0**-5
    assert (total / 400 - w).abs().max() < 5 * step * (0.3254 / 400) ** 0.5


def test_one_step_has_one_noise() -> None:
    w, q = torch.randn(64, 64), quantizer()
    first = q(w)
    assert torch.equal(q(w), first)
    q.rounding.advance()
    assert not torch.equal(q(w), first)


def test_many_bits_leave_the_weight_as_it_is() -> None:
    w, q = torch.randn(32, 32).bfloat16(), quantizer((32, 32))
    q.scale.first = 40.0
    assert torch.equal(q(w), w)


def test_more_bits_than_codes_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="first_bits=6"):
        GaussWS(first_bits=8.0)
    w, q = torch.randn(32, 32), quantizer((32, 32)).eval()
    with torch.no_grad():
        next(q.learned()).fill_(2.5)
    with pytest.raises(ValueError, match="more bits than its codes"):
        q.quantize(w)


def test_gradients_are_those_of_the_formula_with_the_noise_held() -> None:
    """dW = D; db = -ln 2 sum D R max|W| 2^(1 - b), by autograd of the formula."""
    w, grad, q = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64), quantizer()
    (value,) = q.learned()
    y = q(w)
    with torch.no_grad():
        largest = w.view(2, 32, 2, 32).abs().amax((1, 3), keepdim=True)
        r = ((y - w).view(2, 32, 2, 32) / (largest * 2.0**-5)).round()
    got_w, got_value = torch.autograd.grad(y, [w, value], grad)
    b = torch.full((2, 1, 2, 1), 1.0, requires_grad=True)
    reference = w + (r * largest * torch.exp2(1 - (4 + 2 * b))).view(64, 64)
    want_w, want_b = torch.autograd.grad(reference, [w, b], grad)
    assert torch.equal(got_w, want_w)
    assert torch.allclose(got_value.flatten(), want_b.flatten(), rtol=1e-4, atol=1e-3)


def test_evaluation_is_free_of_noise_and_is_what_is_stored() -> None:
    w, q = torch.randn(64, 64), quantizer()
    q.eval()
    assert torch.equal(q(w), q(w))
    assert torch.equal(q.dequantize(q.quantize(w), w.dtype), q(w))
    step = w.abs().max() * 2.0**-5
    assert (q(w) - w).abs().max() <= step / 2 + 1e-6


def test_the_pull_may_be_left_out() -> None:
    assert GaussWS(decay=0.0).extras() == []
    assert len(GaussWS().extras()) == 1
