"""MatQuant's nested bits against models of one precision each (arXiv 2502.06786)."""

from collections.abc import Callable
from typing import Any

from bases import trainer as another
from claim import Arm, Claim, Numbers, mean

from qlightning import QATCallback
from qlightning.methods import MatQuant
from qlightning.methods.matquant import Sliced, set_bits
from qlightning.numerics import PerChannel, Quantizer


def at(bits: int) -> Callable[[Any, Any, Any], float]:
    """The held-out loss of the top bits, by a Trainer that does not convert to the trained ones."""

    def metric(module: Any, trainer: Any, data: Any) -> float:
        set_bits(module, bits)
        (metrics,) = another([], 1).validate(module, data, verbose=False)
        return float(metrics["val_loss"])

    return metric


def eight() -> list[Any]:
    """Training at eight bits alone, on the grid that can be sliced."""
    return [QATCallback(weight=Quantizer(Sliced(8), PerChannel()))]


def nested_two_bits_are_best(numbers: Numbers) -> bool:
    alone, sliced, nested = (
        mean(numbers[arm]) for arm in ("2 bits alone", "8 bits, sliced to 2", "matquant, top 2 bits")
    )
    return nested <= alone < sliced


def costs_little_above(numbers: Numbers) -> bool:
    return all(
        mean(numbers[f"matquant, top {bits} bits"]) <= 1.005 * mean(numbers[f"{bits} bits alone"]) for bits in (4, 8)
    )


# a step of MatQuant runs the model three times
STEPS, SEEDS = 100, (0, 1)

CLAIMS = [
    Claim(
        name="matquant-2bit",
        says="Two bits sliced from a nested model are at least as good as two bits trained alone; two bits sliced from "
        "an eight-bit model fail (claims of the abstract; the comparison from memory).",
        base="llama",
        arms={
            "2 bits alone": Arm(lambda: [QATCallback(weight="int2-asym")]),
            "8 bits, sliced to 2": Arm(eight, metric=at(2)),
            "matquant, top 2 bits": Arm(MatQuant().callbacks, metric=at(2)),
        },
        holds=nested_two_bits_are_best,
        expected="matquant <= 2 bits alone < 8 bits, sliced to 2",
        steps=STEPS,
        seeds=SEEDS,
    ),
    Claim(
        name="matquant-above",
        says="At eight and four bits the nested model is within half a percent of models trained for these alone.",
        base="llama",
        arms={
            "8 bits alone": Arm(eight),
            "matquant, top 8 bits": Arm(MatQuant().callbacks),
            "4 bits alone": Arm(lambda: [QATCallback(weight="int4-asym")]),
            "matquant, top 4 bits": Arm(MatQuant().callbacks, metric=at(4)),
        },
        holds=costs_little_above,
        expected="at 8 and at 4 bits matquant <= 1.005 times alone",
        steps=STEPS,
        seeds=SEEDS,
    ),
]
