"""Activation steps as functions of the time step, against steps that know no time (arXiv 2306.02316)."""

from typing import Any

from claim import Arm, Claim, Numbers, mean
from compared import Timeless

from qlightning import Scheme
from qlightning.methods import TDQ, Quantization, compose
from qlightning.numerics import Int, Quantizer
from qlightning.numerics.per_sample import PerSample

# first and last layer in float, and learned steps at the weights' rate, in every arm
SHARED: dict[str, Any] = {"rules": {"conv_in": None, "conv_out": None}, "scale_lr": 1.0}
SILU = ["conv1", "conv2", "time_emb_proj", "time_embedding.linear_2"]
METHOD = TDQ(8, 4, features=32, silu=SILU)


def timeless() -> list[Any]:
    given = METHOD.quantization()
    for scheme in given["rules"].values():
        scheme.input.scale = Timeless(**scheme.input.scale.arguments())
    return compose(Quantization(**given), Quantization(**SHARED))


def same_for_all(input: Any, weight: str) -> Arm:
    rules = {"*": Scheme(weight, input=input), **SHARED["rules"]}
    return Arm(Quantization(**{**SHARED, "rules": rules}).callbacks)


def time_helps(numbers: Numbers) -> bool:
    return mean(numbers["tdq"]) < min(mean(numbers[arm]) for arm in ("min-max", "lsq", "tdq without time"))


CLAIMS = [
    Claim(
        name="tdq",
        says="W8A4: a step per time step predicts noise better than one learned step per layer. The error is that of "
        "the noise, all training alike; the card's distance from the float model is not what training lowers. "
        "A scale per sample at run time is the unconditional alternative, which the paper does not take.",
        base="unet",
        arms={
            "min-max": same_for_all("int4-tensor", "int8-tensor"),
            "lsq": same_for_all("int4-tensor-lsq", "int8-tensor-lsq"),
            "per sample, at run time": same_for_all(Quantizer(Int(4, range="narrow"), PerSample()), "int8-tensor-lsq"),
            "tdq without time": Arm(timeless),
            "tdq": Arm(lambda: compose(METHOD, Quantization(**SHARED))),
        },
        holds=time_helps,
        expected="tdq < min-max, lsq and tdq without time",
        metric="val_eps_mse",
        steps=300,
    ),
]
