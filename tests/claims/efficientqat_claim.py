"""EfficientQAT, one phase after the other, and against plain QAT on as many tokens (arXiv 2407.11062)."""

from typing import Any

from claim import Arm, Claim, ascending

from qlightning import QATCallback
from qlightning.methods import EfficientQAT

BATCHES, EPOCHS, STEPS = 64, 4, 200


def efficient(**options: Any) -> Any:
    """Learning rates for a model ten thousand times smaller than the paper's."""
    given = {"epochs": EPOCHS, "weight_lr": 5e-4, "quant_lr": 1e-3, "batches": BATCHES, **options}
    return EfficientQAT(2, granularity=32, **given).callbacks


CLAIMS = [
    Claim(
        name="efficientqat",
        says="W2: training a block's ranges beats rounding, all of it beats that, and steps end to end add (card S14).",
        base="llama",
        arms={
            "rounding": Arm(efficient(epochs=0), steps=0),
            "ranges by block": Arm(efficient(weight_lr=0.0), steps=0),
            "block-ap": Arm(efficient(), steps=0),
            "block-ap and e2e-qp": Arm(efficient()),
            "plain qat": Arm(lambda: [QATCallback("int2-g32-asym-learned")], steps=EPOCHS * BATCHES + STEPS),
        },
        holds=ascending("block-ap and e2e-qp", "block-ap", "ranges by block", "rounding"),
        expected="block-ap and e2e-qp < block-ap < ranges by block < rounding",
        steps=STEPS,
    ),
]
