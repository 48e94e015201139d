"""LR-QAT between rounding and QAT of the whole model (arXiv 2406.06385)."""

from claim import Arm, Claim, Numbers, mean
from l4q_claim import merged, with_lora

from qlightning import QATCallback
from qlightning.methods import LRQAT


def holds(numbers: Numbers) -> bool:
    rounding, outside, inside, full = (
        mean(numbers[arm]) for arm in ("rounding", "outside, merged, rounded", "lr-qat", "whole model")
    )
    return inside < outside < rounding and inside - full < 0.25 * (rounding - full)


CLAIMS = [
    Claim(
        name="lr-qat",
        says="3 bits per channel: an update inside the rounding beats one merged later and nears QAT of all weights.",
        base="llama",
        arms={
            "rounding": Arm(LRQAT(3).callbacks, steps=0),
            "outside, merged, rounded": Arm(lambda: [QATCallback("int3")], module=with_lora, metric=merged),
            "lr-qat": Arm(LRQAT(3).callbacks, lr=1e-3),
            "whole model": Arm(lambda: [QATCallback("int3-lsq")], lr=5e-4),
        },
        holds=holds,
        expected="lr-qat < outside, merged, rounded < rounding; whole model at most a quarter of the gap below lr-qat",
    ),
]
