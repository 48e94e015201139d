"""LSQ against its formulas; that it trains, resumes and deploys is the contract's (tests/test_methods.py)."""

import pytest
import torch

from qlightning.methods import LSQ
from qlightning.numerics import PerGroup, PerTensor


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_step_starts_at_twice_the_mean_over_the_root_of_the_largest_code(bits: int) -> None:
    w = torch.randn(4, 64)
    quantizer = LSQ(bits).quantization()["weight"]
    quantizer.build((4, 64))
    quantizer.initialize(w)
    (step,) = quantizer.learned()
    expected = 2 * w.abs().mean(1, keepdim=True) / (2 ** (bits - 1) - 1) ** 0.5
    assert torch.allclose(step, expected)


def test_the_step_has_the_gradient_of_equation_3() -> None:
    """Inside: round(v) - v; outside: the end of the range; times 1 / sqrt(elements * Qp)."""
    v = torch.tensor([[-9.3, -3.4, 0.2, 6.7, 12.0]])
    quantizer = LSQ(4, granularity="tensor").quantization()["weight"]
    quantizer.build((1, 5))
    quantizer.initialize(v)
    (step,) = quantizer.learned()
    with torch.no_grad():
        step.fill_(1.0)
    (grad,) = torch.autograd.grad(quantizer(v).sum(), step)
    expected = (-8 + (-3 + 3.4) + (0 - 0.2) + (7 - 6.7) + 7) / (5 * 7) ** 0.5
    assert grad.item() == pytest.approx(expected, rel=1e-5)


def test_granularity_is_an_argument() -> None:
    assert LSQ(granularity="tensor").quantization()["weight"].granularity == PerTensor()
    assert LSQ(granularity=32).quantization()["weight"].granularity == PerGroup(32)


def test_inputs_stay_float_unless_asked_for_and_have_an_offset_in_lsq_plus() -> None:
    assert LSQ().quantization()["input"] is None
    assert LSQ(input_bits=4).quantization()["input"].format.symmetric
    plus = LSQ(input_bits=4, offset=True).quantization()["input"]
    assert not plus.format.symmetric
    assert plus.scale.real_zero
