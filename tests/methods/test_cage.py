"""CAGE as a method; its equations are in tests/optim/test_cage.py, a run's in tests/callbacks/test_cage.py."""

import pytest
import torch

from qlightning.callbacks.cage import CAGECallback
from qlightning.callbacks.qat import QATCallback
from qlightning.methods import CAGE, LSQ, compose
from qlightning.methods.cage import gaussian_step
from qlightning.numerics import Int


def test_what_it_is_made_of() -> None:
    qat, pull = CAGE(bits=3, input_bits=None, strength=2.5, silence=0.9, ramp="none", mode="coupled").callbacks()
    assert isinstance(qat, QATCallback)
    assert isinstance(pull, CAGECallback)
    assert (pull.strength, pull.silence, pull.ramp, pull.mode) == (2.5, 0.9, "none", "coupled")
    assert CAGE().quantization()["weight"].format == Int(4)
    assert CAGE(bits=3, input_bits=None).quantization().keys() == {"weight"}
    with pytest.raises(ValueError, match=r"silence=1\.5"):
        CAGE(silence=1.5)


def test_it_composes_with_the_quantizers_of_another_method() -> None:
    qat, pull = compose(LSQ(bits=3), CAGE(bits=None))
    assert isinstance(pull, CAGECallback)
    assert qat.rules["*"].weight == LSQ(bits=3).quantization()["weight"]
    with pytest.raises(ValueError, match="one run has one of them"):
        compose(LSQ(bits=3), CAGE())


@pytest.mark.parametrize(("bits", "max_1960"), [(2, 0.9957), (3, 0.5860), (4, 0.3352), (5, 0.1881), (6, 0.1041)])
def test_the_step_is_near_to_that_of_max(bits: int, max_1960: float) -> None:
    """Quantizing for minimum distortion (Max, 1960), table II, whose grid lies half a step beside ours."""
    assert gaussian_step(Int(bits)) == pytest.approx(max_1960, rel=0.11)


def test_it_is_the_best_step_for_gaussian_weights_after_the_rotation() -> None:
    torch.manual_seed(0)
    w = torch.randn(16, 1024)
    quantizer = CAGE().quantization()["weight"]
    quantizer.build((16, 1024))
    error = (quantizer(w) - w).square().mean()
    rotated = quantizer.transform(w)
    for factor in (0.85, 1.15):
        step = gaussian_step(Int(4)) * factor
        other = (torch.round(rotated / step).clamp(-8, 7) * step - rotated).square().mean()
        assert error < other
    assert error < 0.0125  # 0.01154 in the table, for a grid that is symmetric
