"""LSQ against a fixed step (arXiv 1902.08153, section 3)."""

from claim import Arm, Claim, ascending

from qlightning import QATCallback
from qlightning.methods import LSQ

CLAIMS = [
    Claim(
        name="lsq",
        says="Learned steps beat fixed ones at low precision (section 3.4), and QAT beats rounding.",
        base="llama",
        arms={
            "rounding": Arm(lambda: [QATCallback(weight="int2")], steps=0),
            "fixed step": Arm(lambda: [QATCallback(weight="int2")]),
            "lsq": Arm(LSQ(bits=2).callbacks),
        },
        holds=ascending("lsq", "fixed step", "rounding"),
        expected="lsq < fixed step < rounding",
        seeds=(0, 1, 2),
    ),
]
