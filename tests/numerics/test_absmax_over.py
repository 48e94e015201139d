"""Absmax with a bound of one's own."""

import pytest
import torch

from qlightning.numerics import Int, PerChannel, PerToken, Quantizer
from qlightning.numerics.absmax_over import AbsMaxOver


def test_over_128_the_positive_maximum_saturates_and_the_negative_one_does_not() -> None:
    x = torch.tensor([[1.0, -0.3], [-1.0, 0.3]])
    codes = Quantizer(Int(8), PerToken(), scale=AbsMaxOver(128)).quantize(x).codes
    assert codes[:, 0].tolist() == [127, -128]


def test_over_127_both_are_exact_and_it_is_the_narrow_range() -> None:
    x = torch.cat([torch.eye(4), -torch.eye(4), torch.randn(20, 4)])
    quantizer = Quantizer(Int(8), PerToken(), scale=AbsMaxOver(127))
    assert torch.equal(quantizer(x), Quantizer(Int(8, range="narrow"), PerToken())(x))
    assert torch.equal(quantizer(x[:8]), x[:8])


@pytest.mark.parametrize("bits", [3, 4])
def test_over_the_largest_code_the_largest_magnitude_of_a_row_stays(bits: int) -> None:
    w = torch.randn(16, 32)
    largest = 2 ** (bits - 1) - 1
    q = Quantizer(Int(bits), PerChannel(), scale=AbsMaxOver(largest))(w)
    at = w.abs().argmax(1, keepdim=True)
    assert torch.allclose(q.gather(1, at), w.gather(1, at), rtol=1e-6)


def test_a_bound_is_positive() -> None:
    with pytest.raises(ValueError, match="AbsMaxOver"):
        AbsMaxOver(0)
