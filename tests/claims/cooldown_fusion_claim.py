"""Cooldown fusion against two separate decays, and the best share of QAT (arXiv 2509.22935)."""

from typing import Any

from claim import Arm, Claim, Numbers, mean

from qlightning import QATCallback
from qlightning.methods import CooldownFusion
from qlightning.methods.cooldown_fusion import FusedCooldown
from qlightning.schedules import Restart, WarmupStableDecay

SHARE = 0.3
SHARES = (0.05, 0.1, 0.2, 0.4, 0.8)
BUDGETS = (150, 1500)


def classic() -> list[Any]:
    """Float training with its own cooldown, then QAT with its own warmup and cooldown."""
    before, after = WarmupStableDecay(warmup=0.05, decay=0.2), WarmupStableDecay(warmup=0.05, decay=0.8)
    schedule = Restart(at="qat", before=before, after=after)
    return [QATCallback("int4-channel-lsq", start=1 - SHARE), FusedCooldown(schedule)]


def best_share(numbers: Numbers, steps: int) -> float:
    return min(SHARES, key=lambda share: mean(numbers[f"{share:g} of {steps}"]))


CLAIMS = [
    Claim(
        name="cooldown-fusion",
        says="4 bits, equal tokens: decaying only while quantized is at least as good as decaying twice (card S42).",
        base="llama-scratch",
        arms={
            "fused": Arm(CooldownFusion(start=1 - SHARE, weight="int4-channel-lsq").callbacks),
            "classic": Arm(classic),
        },
        holds=lambda numbers: mean(numbers["fused"]) <= mean(numbers["classic"]),
        expected="fused <= classic",
        steps=600,
        seeds=(0, 1, 2),
        lr=2e-3,
    ),
    Claim(
        name="qat-share",
        says="2 bits: the best share of QAT does not shrink when the budget grows tenfold (the law; card S42).",
        base="llama-scratch",
        arms={
            f"{share:g} of {steps}": Arm(
                CooldownFusion(start=1 - share, weight="int2-channel-lsq").callbacks, steps=steps
            )
            for steps in BUDGETS
            for share in SHARES
        },
        holds=lambda numbers: best_share(numbers, BUDGETS[0]) <= best_share(numbers, BUDGETS[1]),
        expected="best share of 150 steps <= best share of 1500 steps",
        steps=BUDGETS[1],
        lr=2e-3,
    ),
]
