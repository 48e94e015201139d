"""Learning rate as a pure function of (step, length of the run).

A schedule holds no state and never sees an optimizer: `factor(step, total)` is what the peak learning rate is
multiplied by at `step` (0-based, `total` steps in all). The tasks hand it to `LambdaLR`, so it resumes through
Lightning, and a resumed run of another length follows the new length at once.

Moments (`warmup`, `decay`, `at`) are steps when written as an int and shares of the schedule's own length when written
as a float, so a schedule with shares fits a trial of 20 steps as it fits the run. Schedules nest: `Restart` gives each
of its two parts its own steps and its own length.

The moment "qat" is the step at which quantization begins, which is written once, in the QATCallback. So what is to
happen at that step cannot drift away from it:

    WarmupStableDecay(decay="qat")     # cooldown fused with QAT: one peak, from which the rate decays while QAT runs
    Restart(at="qat", before=WarmupStableDecay(), after=WarmupStableDecay(decay=0.9))  # each phase with its own decay
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Literal

from qlightning.schedules.steps import known, to_steps

Moment = int | float | Literal["qat"]


class Schedule(ABC):
    """A learning rate's factor over a run. Your own implements `factor` and keeps its arguments as attributes."""

    _start: Callable[[], int] | None = None

    def bind(self, start: Callable[[], int] | None) -> None:
        """Say where quantization begins, for moments written as "qat"; None takes it back.

        A QATCallback does it for every schedule that is an attribute of its LightningModule.
        """
        self._start = start

    def quantization_start(self) -> int:
        """The step that "qat" stands for.

        Raises:
            ValueError: Nobody has said it.
        """
        if self._start is None:
            raise ValueError(
                f"{self!r}: nobody says when quantization begins; train with Trainer(callbacks=[QATCallback(..., "
                "start=0.8)]) and keep the schedule as an attribute of the LightningModule, or write a step or a share "
                "of the run in place of 'qat'"
            )
        return self._start()

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments by name."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    @abstractmethod
    def factor(self, step: int, total: float) -> float:
        """What the peak learning rate is multiplied by.

        Args:
            step: The step about to be taken, 0-based.
            total: Length of the run in steps, `math.inf` where it is not known.
        """

    def plain(self) -> dict[str, Any]:
        """The schedule as YAML would write it: what checkpoints keep, since they hold plain values only."""
        arguments = {k: v.plain() if isinstance(v, Schedule) else v for k, v in self.arguments().items()}
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": arguments}

    @staticmethod
    def of(form: "Schedule | Mapping[str, Any]") -> "Schedule":
        """The schedule itself, or the one whose `plain` form is given."""
        if isinstance(form, Schedule):
            return form
        module, name = form["class_path"].rsplit(".", 1)
        arguments = form.get("init_args", {})
        nested = {k: Schedule.of(v) if isinstance(v, Mapping) else v for k, v in arguments.items()}
        return getattr(import_module(module), name)(**nested)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.arguments().items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and type(self) is type(other) and self.arguments() == other.arguments()

    __hash__ = None  # type: ignore[assignment]  # compared by value


class Constant(Schedule):
    """A linear warmup, then 1 to the end.

    Args:
        warmup: Length of the warmup; steps (int) or share of the schedule (float).
    """

    def __init__(self, warmup: int | float = 0) -> None:
        self.warmup = warmup

    def factor(self, step: int, total: float) -> float:
        return _warm(step, to_steps(self.warmup, total))


class Cosine(Schedule):
    """A linear warmup, then half a cosine from 1 down to `floor`, which the step after the last would reach.

    >>> [round(Cosine(warmup=1, floor=0.1).factor(s, 5), 3) for s in range(6)]
    [0.5, 1.0, 0.868, 0.55, 0.232, 0.1]

    Args:
        warmup: Length of the warmup; steps (int) or share of the schedule (float).
        floor: The factor at the end.
    """

    def __init__(self, warmup: int | float = 0.05, floor: float = 0.0) -> None:
        self.warmup = warmup
        self.floor = _share("floor", floor)

    def factor(self, step: int, total: float) -> float:
        warmup, total = to_steps(self.warmup, total), known(total)
        if step < warmup:
            return _warm(step, warmup)
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


class WarmupStableDecay(Schedule):
    """A linear warmup, a long stretch at 1, a straight line down to `floor`, which the step after the last would reach.

    Where warmup and decay overlap, the smaller of the two counts. With `decay="qat"` it is the fused cooldown of
    Compute-Optimal QAT (S42, arXiv 2509.22935): the last factor 1 is that of the first quantized step.

    Args:
        warmup: Length of the warmup; steps (int) or share of the schedule (float).
        decay: Length of the decay at the end; steps (int), share of the schedule (float), or "qat": as long as
            quantization acts.
        floor: The factor at the end.
    """

    def __init__(self, warmup: int | float = 0.05, decay: Moment = 0.2, floor: float = 0.0) -> None:
        self.warmup = warmup
        self.decay = _moment("decay", decay)
        self.floor = _share("floor", floor)

    def factor(self, step: int, total: float) -> float:
        warmup, total = to_steps(self.warmup, total), known(total)
        decay = total - self.quantization_start() if self.decay == "qat" else to_steps(self.decay, total)
        down = min(1.0, max(0.0, (total - step) / max(1, decay)))
        return min(_warm(step, warmup), self.floor + (1 - self.floor) * down)


class Restart(Schedule):
    """One schedule up to a moment of the run, another with its own peak from there: float training, then QAT.

    Quantization-aware training wants a fresh warmup and a lower peak than training in float, and the float phase wants
    to be decayed when it ends, or it is not the float model that one would have shipped.

    >>> two = Restart(at=0.75, before=Cosine(warmup=0), after=Constant(), peak=0.2)
    >>> [round(two.factor(s, 8), 3) for s in (0, 3, 5, 6, 7)]
    [1.0, 0.5, 0.067, 0.2, 0.2]

    Args:
        at: The first step of the second schedule; step (int), share of the run (float), or "qat": the step at which
            quantization begins.
        before: The schedule up to there; its length is the phase's.
        after: The schedule from there on; its length is the phase's.
        peak: What the second schedule's factors are multiplied by.
    """

    def __init__(self, at: Moment, *, before: Schedule, after: Schedule, peak: float = 1.0) -> None:
        self.at = _moment("at", at)
        for part in (before, after):
            if "qat" in part.arguments().values():
                raise ValueError(
                    f"{part!r} counts its own steps, in which 'qat' means nothing: write Restart(at='qat', ...)"
                )
        self.before = before
        self.after = after
        self.peak = peak
        if not 0 < peak < math.inf:
            raise ValueError(f"Restart(peak={peak!r}): the peak is a positive factor, for example peak=0.2")

    def factor(self, step: int, total: float) -> float:
        boundary = self.quantization_start() if self.at == "qat" else to_steps(self.at, total)
        if boundary >= total:
            raise ValueError(
                f"Restart(at={self.at!r}) lies at or beyond the end of a run of {total} steps, so its second schedule "
                "would never act: write a share of the run, for example at=0.75"
            )
        if step < boundary:
            return self.before.factor(step, boundary)
        return self.peak * self.after.factor(step - boundary, total - boundary)


def _warm(step: int, warmup: int) -> float:
    """A straight line to 1 at step `warmup`, not from 0: a step at learning rate 0 would be thrown away."""
    return min(1.0, (step + 1) / (warmup + 1))


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} is a share of the peak learning rate: write for example {name}=0.1")
    return value


def _moment(name: str, value: Moment) -> Moment:
    if isinstance(value, str) and value != "qat":
        raise ValueError(f"{name}={value!r}: write steps as 100, a share of the run as 0.1, or {name}='qat'")
    return value
