"""What a claim is: arms that are trained side by side, and what a paper says of their order.

A file `tests/claims/<method>_claim.py` holds `CLAIMS`, a list; `run.py` finds the files, trains every arm on every seed
from the same float model, and writes RESULTS.md. A claim that does not hold is reported with its numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

Numbers = Mapping[str, Sequence[float]]
"""The metric of each arm, one number per seed, in the order of the seeds."""


@dataclass
class Arm:
    """One way to train.

    Attributes:
        callbacks: Makes what goes into Trainer(callbacks=...), anew for each seed.
        steps: Optimizer steps; 0 calibrates and evaluates without learning. The claim's when not given.
        lr: Peak learning rate; the claim's when not given.
        module: What becomes of the task before it is fitted (a PEFT model, a smaller one), or None.
        data: A datamodule in place of the base's, or None.
        metric: Computed by this function of (module, trainer, datamodule) in place of the validation's number.
    """

    callbacks: Callable[[], list[Any]] = list
    steps: int | None = None
    lr: float | None = None
    module: Callable[[Any], Any] | None = None
    data: Callable[[Any], Any] | None = None
    metric: Callable[[Any, Any, Any], float] | None = None


@dataclass
class Claim:
    """What a paper says, as far as a small experiment can see it.

    Attributes:
        name: Short and unique; results are kept under it.
        says: The claim and where it stands in the paper or its card.
        base: The float model it starts from: "llama", "vit", "resnet" or "unet"; "<base>-scratch" starts untrained.
        arms: By name.
        holds: Whether the numbers bear it out.
        expected: The same in words.
        metric: What the validation logs; lower is better unless its name says accuracy.
        steps: Optimizer steps of each arm.
        lr: Peak learning rate, with a warmup of 5 % and a cosine to zero.
        seeds: Of data order and of the float model.
    """

    name: str
    says: str
    base: str
    arms: dict[str, Arm]
    holds: Callable[[Numbers], bool]
    expected: str
    metric: str = "val_loss"
    steps: int = 200
    lr: float = 5e-4
    seeds: Sequence[int] = field(default=(0, 1))


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def ascending(*arms: str) -> Callable[[Numbers], bool]:
    """Whether the arms' means come in this order, lowest first."""

    def holds(numbers: Numbers) -> bool:
        means = [mean(numbers[arm]) for arm in arms]
        return all(a < b for a, b in pairwise(means))

    return holds
