"""When to switch from 16 to 1.58 bits, and what a ramp and kept moments do (arXiv 2502.11895)."""

from typing import Any

from claim import Arm, Claim, Numbers, mean
from lightning.pytorch import Callback

from qlightning.methods import ContinualTernary

STEPS, SWITCH, RAMP, WINDOW = 600, 120, 40, 50


class Losses(Callback):
    """The training loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def spike(module: Any, trainer: Any, data: Any) -> float:
    """Highest loss in the steps behind the switch, less the mean before it."""
    (record,) = [callback for callback in trainer.callbacks if isinstance(callback, Losses)]
    before = record.losses[SWITCH - 20 : SWITCH]
    return max(record.losses[SWITCH : SWITCH + WINDOW]) - sum(before) / len(before)


def switched(optimizer: Any, ramp: int) -> Any:
    return lambda: [*ContinualTernary(start=SWITCH, optimizer=optimizer, ramp=ramp).callbacks(), Losses()]


def never_is_worst(numbers: Numbers) -> bool:
    return all(mean(numbers[f"{start:.0%} float"]) < mean(numbers["0% float"]) for start in (0.1, 0.2, 0.5))


def within_noise(numbers: Numbers) -> bool:
    means = [mean(values) for values in numbers.values()]
    spread = max(max(values) - min(values) for values in numbers.values())
    return max(means) - min(means) < spread


def help_at_first(numbers: Numbers) -> bool:
    at_once = mean(numbers["keep"])
    return mean(numbers["keep, ramp"]) < at_once and at_once < mean(numbers["reset"])


WAYS = {
    "keep": ("keep", 0),
    "keep, ramp": ("keep", RAMP),
    "reset": ("reset", 0),
    "reset, ramp": ("reset", RAMP),
}

CLAIMS = [
    Claim(
        name="continual_ternary",
        says="16 -> 1.58 beats 1.58 from scratch; early and middle switches are best.",
        base="llama-scratch",
        arms={
            f"{start:.0%} float": Arm(ContinualTernary(start=start).callbacks) for start in (0.0, 0.1, 0.2, 0.5, 0.8)
        },
        holds=never_is_worst,
        expected="10%, 20% and 50% float < 0% float",
        steps=STEPS,
        lr=2e-3,
    ),
    Claim(
        name="continual_ternary-spike",
        says="A ramp and kept optimizer state shrink the loss spike at the switch.",
        base="llama-scratch",
        arms={name: Arm(switched(*way), metric=spike) for name, way in WAYS.items()},
        holds=help_at_first,
        expected="keep, ramp < keep < reset",
        metric="loss spike",
        steps=STEPS,
        lr=2e-3,
    ),
    Claim(
        name="continual_ternary-end",
        says="With further training the difference between keep and reset, ramp and none vanishes.",
        base="llama-scratch",
        arms={name: Arm(switched(*way)) for name, way in WAYS.items()},
        holds=within_noise,
        expected="means of the four arms closer than the seeds of one",
        steps=STEPS,
        lr=2e-3,
    ),
]
