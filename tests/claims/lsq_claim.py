"""LSQ against a fixed step (arXiv 1902.08153, section 3)."""

from typing import Any

from claim import Arm, Claim, ascending

from qlightning import QATCallback
from qlightning.methods import LSQ, Quantization, compose

ENDS = Quantization(rules={"*embedder.embedder*": None, "classifier*": None})
LEARNED = LSQ(bits=2, input_bits=4, offset=True)


def fixed_step() -> list[Any]:
    """The same learned inputs under weights whose step follows from their largest."""
    return compose(Quantization(**{**LEARNED.quantization(), "weight": "int2-channel"}), ENDS)


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
    Claim(
        name="lsq-resnet",
        says="The same order on a ResNet-20: 2-bit weights under 4-bit inputs with a learned offset (LSQ+), first and "
        "last layer in float (the papers: at 8 bits).",
        base="resnet",
        arms={
            # inputs need 8 batches to find their range
            "rounding": Arm(fixed_step, steps=9, lr=0.0),
            "fixed step": Arm(fixed_step),
            "lsq": Arm(lambda: compose(LEARNED, ENDS)),
        },
        holds=ascending("rounding", "fixed step", "lsq"),
        expected="lsq > fixed step > rounding",
        metric="val_accuracy",
        steps=600,
        lr=1e-3,
    ),
]
