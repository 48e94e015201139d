"""EfficientDM: rates by scale and a step per sampler step (arXiv 2310.03270, ablations)."""

from typing import Any

from claim import Arm, Claim, Numbers, mean

from qlightning.data import Digits
from qlightning.methods import EfficientDM

RATES = (3e-6, 3e-5, 3e-4)
EIGHT = ["conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_out"]


def arm(**options: Any) -> Arm:
    method = EfficientDM(4, 4, steps=20, calibration=20, eight_bit=EIGHT, **options)
    return Arm(method.callbacks, data=lambda source: Digits(batch_size=8, seed=source.seed))


def holds(numbers: Numbers) -> bool:
    whole = mean(numbers["efficientdm"])
    others = [mean(numbers[f"one rate, {rate:g}"]) for rate in RATES]
    return whole < min([*others, mean(numbers["one step for all"]), mean(numbers["calibrated"])])


CLAIMS = [
    Claim(
        name="efficientdm",
        says="W4A4: training on the trajectory beats calibration, rates by scale beat one rate, tables beat one step.",
        base="unet",
        arms={
            "calibrated": arm(adapter_lr=0.0, weight_scale_lr=0.0, input_scale_lr=0.0),
            "efficientdm": arm(),
            "one step for all": arm(table_rows=1),
            **{f"one rate, {rate:g}": arm(adapter_lr=rate) for rate in RATES},
        },
        holds=holds,
        expected="efficientdm lowest",
        metric="val_eps_mse",
        steps=800,
    ),
]
