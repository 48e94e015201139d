"""ParetoQ against LSQ and min-max steps, width by width (arXiv 2502.02631, sections 3 and 4)."""

import copy
from typing import Any

from claim import Arm, Claim, Numbers, ascending, mean

from qlightning import QATCallback
from qlightning.methods import ParetoQ, Quantization, compose
from qlightning.methods.paretoq import RelativeChange
from qlightning.numerics import (
    LSQ,
    AbsMax,
    Bins,
    Int,
    Learned,
    LSQStep,
    OverTensor,
    PerChannel,
    Quantizer,
    StretchedElastic,
    Ternary,
)


def own(quantizer: Quantizer) -> Arm:
    return Arm(lambda: compose(Quantization(weight=copy.deepcopy(quantizer), scale_lr=1.0)))


def lsq(format: Any) -> Arm:
    return own(Quantizer(format, PerChannel(), scale=Learned(LSQStep()), gradient=OverTensor(LSQ())))


def seq(levels: int) -> Arm:
    gradient = OverTensor(StretchedElastic())
    return own(Quantizer(Bins(levels), PerChannel(), scale=Learned(AbsMax()), gradient=gradient))


def change(module: Any, trainer: Any, data: Any) -> float:
    (logger,) = [callback for callback in trainer.callbacks if isinstance(callback, RelativeChange)]
    return logger.latest["relative_change"]


def jumps_below_three_bits(numbers: Numbers) -> bool:
    one, ternary, two, three, four = (mean(numbers[f"{bits} bits"]) for bits in ("1", "1.58", "2", "3", "4"))
    return min(one, ternary, two) > max(three, four) and two / three > three / four


CLAIMS = [
    Claim(
        name="paretoq-ternary",
        says="Stretched elastic ternary beats a ternary LSQ and ternary rounding to absmean (section 4).",
        base="llama",
        arms={
            "fixed step": Arm(lambda: [QATCallback(weight="ternary-channel")]),
            "lsq": lsq(Ternary()),
            "paretoq": Arm(ParetoQ(1.58).callbacks),
            "paretoq, exact saturation": Arm(ParetoQ(1.58, saturation="exact").callbacks),
        },
        holds=ascending("paretoq", "lsq"),
        expected="paretoq < lsq",
    ),
    Claim(
        name="paretoq-2bit",
        says="At two bits stretched bins without zero beat LSQ and min-max (section 4).",
        base="llama",
        arms={
            "fixed step": Arm(lambda: [QATCallback(weight="int2")]),
            "lsq": lsq(Int(2)),
            "paretoq": Arm(ParetoQ(2).callbacks),
        },
        holds=ascending("paretoq", "lsq", "fixed step"),
        expected="paretoq < lsq < fixed step",
    ),
    Claim(
        name="paretoq-3bit",
        says="At three bits and more LSQ is at least as good as stretched bins (section 4).",
        base="llama",
        arms={"stretched bins": seq(8), "paretoq": Arm(ParetoQ(3).callbacks)},
        holds=lambda numbers: mean(numbers["paretoq"]) <= mean(numbers["stretched bins"]),
        expected="paretoq (which is LSQ) <= stretched bins",
    ),
    Claim(
        name="paretoq-change",
        says="Three bits and more compensate weights, fewer rebuild them: the change jumps at 2 bits (section 3).",
        base="llama",
        arms={f"{bits} bits": Arm(ParetoQ(bits).callbacks, metric=change) for bits in (1, 1.58, 2, 3, 4)},
        holds=jumps_below_three_bits,
        expected="relative change below 3 bits above that at 3 and 4; larger step from 3 to 2 than from 4 to 3",
        metric="relative change",
    ),
    Claim(
        name="paretoq-split",
        says="Of a fixed budget about 90 % float and 10 % quantized is best (section 3).",
        base="llama-scratch",
        arms={f"{start:.0%} float": Arm(ParetoQ(2, start=start).callbacks) for start in (0.0, 0.5, 0.9)},
        holds=ascending("90% float", "50% float", "0% float"),
        expected="90% < 50% < 0% float",
        steps=600,
        lr=2e-3,
    ),
]
