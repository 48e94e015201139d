"""The step that covers both ends, against its formula."""

import pytest
import torch

from qlightning.numerics import Int, Learned, PerChannel, Quantizer, UInt
from qlightning.numerics.cover import Cover


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_nothing_saturates_and_one_end_is_met(bits: int, symmetric: bool) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    format = Int(bits, symmetric=symmetric)
    step, lower = Cover().measure(x, format)
    expected = torch.maximum((x.amin(1) / format.low).abs(), (x.amax(1) / format.high).abs())
    assert torch.allclose(step[:, 0], expected)
    assert symmetric == (lower is None)
    v = x / step
    assert v.min() >= format.low - 1e-5
    assert v.max() <= format.high + 1e-5


def test_code_zero_means_zero() -> None:
    quantizer = Quantizer(Int(4, symmetric=False), PerChannel(), scale=Learned(Cover(), zero="real"))
    quantizer.build((3, 16))
    quantizer.initialize(torch.randn(3, 16) + 2)
    assert torch.equal(quantizer.quantize(torch.zeros(3, 16)).codes, torch.zeros(3, 16, dtype=torch.int8))
    assert not quantizer.scale.lower.any()


def test_values_of_one_sign() -> None:
    step, _ = Cover().measure(torch.tensor([[1.0, 2.0]]), UInt(2))
    assert step.item() == pytest.approx(2 / 3)
    step, _ = Cover().measure(torch.tensor([[-1.0, -2.0]]), Int(2))
    assert step.item() == 1.0
