"""What rotation and adaptive rounding do to two-bit weights (arXiv 2307.13304)."""

from typing import Any

from claim import Arm, Claim, Numbers, mean

from qlightning import QATCallback, solvers
from qlightning.methods import GPTQ, QuIP
from qlightning.methods.quip import RMS
from qlightning.numerics import PerTensor, Quantizer
from qlightning.numerics.bins import Bins
from qlightning.solvers.incoherence import Incoherence

BATCHES = 16


def grid(transform: Any = None) -> Quantizer:
    return Quantizer(Bins(4), PerTensor(), scale=RMS(), transform=transform)


def unrotated() -> list[Any]:
    solver = solvers.LDLQ(greedy=1, order="activation", damping=0.02, batches=BATCHES)
    return [QATCallback(weight=grid(), init=solver)]


def both_parts_help(numbers: Numbers) -> bool:
    rounding, gptq, rotated, adaptive, quip = (
        mean(numbers[arm]) for arm in ("rounding", "gptq", "rounding, rotated", "ldlq", "quip")
    )
    return rotated < rounding and quip < min(gptq, rotated, adaptive)


CLAIMS = [
    Claim(
        name="quip",
        says="Two bits without training: incoherence processing makes rounding work and LDLQ work better; GPTQ per "
        "channel fails (Llama-2-70B, from memory). 'ldlq' is the same solver and grid in the weight's own basis.",
        base="llama",
        arms={
            "rounding": Arm(lambda: [QATCallback(weight="int2-asym")]),
            "gptq": Arm(GPTQ(2, batches=BATCHES).callbacks),
            "rounding, rotated": Arm(lambda: [QATCallback(weight=grid(Incoherence(seed=0)))]),
            "ldlq": Arm(unrotated),
            "quip": Arm(QuIP(2, batches=BATCHES).callbacks),
        },
        holds=both_parts_help,
        expected="rounding, rotated < rounding; quip < gptq, ldlq and rounding, rotated",
        steps=0,
    ),
]
