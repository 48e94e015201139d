"""GPTQ against rounding, as a result and as a beginning (arXiv 2210.17323)."""

from claim import Arm, Claim, Numbers, ascending, mean

from qlightning import QATCallback
from qlightning.methods import GPTQ

BATCHES = 16


def beats_rounding(numbers: Numbers) -> bool:
    return all(mean(numbers[f"gptq{how}"]) < mean(numbers[f"rounding{how}"]) for how in ("", ", groups"))


CLAIMS = [
    Claim(
        name="gptq",
        says="Three bits without training: GPTQ beats rounding, per channel (section 4, tables of 3 and 4 bits) and "
        "with groups (table 6).",
        base="llama",
        arms={
            "rounding": Arm(lambda: [QATCallback(weight="int3-asym")]),
            "gptq": Arm(GPTQ(3, batches=BATCHES).callbacks),
            "rounding, groups": Arm(lambda: [QATCallback(weight="int3-asym-g32")]),
            "gptq, groups": Arm(GPTQ(3, granularity=32, batches=BATCHES).callbacks),
        },
        holds=beats_rounding,
        expected="gptq < rounding; gptq, groups < rounding, groups",
        steps=0,
    ),
    Claim(
        name="gptq-trained",
        says="Ours, not the paper's: two-bit training from GPTQ's solution ends lower than from rounding.",
        base="llama",
        arms={
            "from rounding": Arm(lambda: [QATCallback(weight="int2-asym-g32")]),
            "from gptq": Arm(GPTQ(2, granularity=32, batches=BATCHES).callbacks),
            "from gptq, residual kept": Arm(GPTQ(2, granularity=32, batches=BATCHES, commit="residual").callbacks),
        },
        holds=ascending("from gptq", "from rounding"),
        expected="from gptq < from rounding",
        steps=100,
    ),
]
