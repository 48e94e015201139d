"""Ternary training from scratch with the median, and what width it needs (arXiv 2407.09527)."""

from typing import Any

from bases import config
from claim import Arm, Claim, Numbers, mean

from qlightning.methods import BitNetReloaded


def twice_as_wide(given: Any) -> Any:
    narrow = config("llama")["model"]["init_args"]["model"]
    wide = {name: 2 * narrow[name] for name in ("hidden_size", "intermediate_size")}
    return type(given)(**{**given.hparams, "model": {**narrow, **wide}})


def width_makes_up(numbers: Numbers) -> bool:
    ternary, wide, plain = (mean(numbers[arm]) for arm in ("median", "median, twice the width", "float"))
    return plain < ternary and wide < ternary and wide <= 1.01 * plain


CLAIMS = [
    Claim(
        name="bitnet_reloaded",
        says="Small ternary language models need about twice the hidden size to match 16 bits.",
        base="llama-scratch",
        arms={
            "float": Arm(),
            "mean": Arm(BitNetReloaded(measure="mean").callbacks),
            "median": Arm(BitNetReloaded().callbacks),
            "median, twice the width": Arm(BitNetReloaded().callbacks, module=twice_as_wide),
        },
        holds=width_makes_up,
        expected="float < median; median with twice the width < median, and within 1 % of float or better",
        steps=600,
        lr=2e-3,
    ),
]
