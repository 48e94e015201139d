"""Sums of {1, -1, i, -i} against ternary and binary weights at equal steps (arXiv 2512.02901)."""

from claim import Arm, Claim, Numbers, mean

from qlightning import QATCallback
from qlightning.methods import Fairy2i, ParetoQ


def beats_its_width(numbers: Numbers) -> bool:
    binary, ternary, one, two = (mean(numbers[arm]) for arm in ("binary", "ternary", "W1", "W2"))
    return one < binary and two < ternary


CLAIMS = [
    Claim(
        name="fairy2i",
        says="Fine-tuned from a float model, one stage beats binary weights and two stages beat ternary ones "
        "(LLaMA-2-7B on C4: W1 11.03 and binary 11.75, W2 7.85 and ternary 11.06). All have scales per tensor. ParetoQ "
        "is the other two-bit baseline; the paper does not compare with it.",
        base="llama",
        arms={
            "binary": Arm(lambda: [QATCallback(weight="binary-tensor")]),
            "W1": Arm(Fairy2i(1).callbacks),
            "ternary": Arm(lambda: [QATCallback(weight="ternary")]),
            "W2": Arm(Fairy2i(2).callbacks),
            "paretoq, 2 bits": Arm(ParetoQ(2).callbacks),
        },
        holds=beats_its_width,
        expected="W1 < binary; W2 < ternary",
    ),
]
