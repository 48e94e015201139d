"""Training under rounded Gaussian noise, and what a cast to four-bit blocks costs afterwards (arXiv 2505.11170)."""

from collections.abc import Callable
from typing import Any

from claim import Arm, Claim, ascending
from compared import UniformNoise

from qlightning.layers.convert import quantizers_of
from qlightning.methods import GaussWS, Quantization
from qlightning.numerics.rounding import Nearest, Rounding

STEPS = 200


def arm(rounding: Callable[[], Rounding] | None = None, *, start: int = 0, metric: Any = None) -> Arm:
    """Blocks of four bits in every arm: in a short run learned bits would not get from six down to four."""

    def callbacks() -> list[Any]:
        given = GaussWS(4, 4, decay=0, start=start).quantization()
        if rounding is not None:
            given["weight"].rounding = rounding()
        return Quantization(**given).callbacks()

    return Arm(callbacks, metric=metric)


def gap(module: Any, trainer: Any, data: Any) -> float:
    """Held-out loss of the rounded weights less that of the weights as they were trained."""
    (rounded,) = trainer.validate(module, data, verbose=False)
    for _, quantizer in quantizers_of(module):
        quantizer.enabled = False
    (plain,) = trainer.validate(module, data, verbose=False)
    return float(rounded["val_loss"] - plain["val_loss"])


CLAIMS = [
    Claim(
        name="gaussws",
        says="Rounded to four-bit blocks, a model trained under the noise loses less than a float model does. (The "
        "paper follows the loss of BF16 up to a billion parameters; block and exponent are from memory, and a "
        "review's objection to the proxy is met by rounding in earnest.)",
        base="llama-scratch",
        arms={
            "float": Arm(),
            "float, rounded": arm(start=STEPS - 1),
            "straight-through": arm(Nearest),
            "uniform noise": arm(UniformNoise),
            "gaussws": arm(),
        },
        holds=ascending("gaussws", "float, rounded"),
        expected="gaussws < float, rounded",
        steps=STEPS,
        lr=2e-3,
    ),
    Claim(
        name="gaussws-gap",
        says="The step from trained to rounded weights is smaller after noise than after float training.",
        base="llama-scratch",
        arms={
            "float": arm(start=STEPS - 1, metric=gap),
            "uniform noise": arm(UniformNoise, metric=gap),
            "gaussws": arm(metric=gap),
        },
        holds=ascending("gaussws", "float"),
        expected="gaussws < float",
        metric="val_loss rounded less unrounded",
        steps=STEPS,
        lr=2e-3,
    ),
]
