"""The phases of one run at their steps: what holds at which step, as pure functions of it.

Nothing here has state, so a resumed run needs only the steps that shares of the run stood for.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from qlightning.callbacks.phase import Phase, Rate
from qlightning.schedules.learning_rate import Schedule
from qlightning.schedules.steps import to_steps


class Entry(NamedTuple):
    """A phase with its times in optimizer steps and its place in the list that was given."""

    at: int
    ramp: int
    phase: Phase
    number: int


class Timeline:
    """The phases of one run, in the order in which they begin.

    Args:
        phases: The phases, in any order.
        at: The step at which each begins.
        ramp: The steps over which each ramps.
        end: Length of the run in steps; asked only where it matters.
    """

    def __init__(
        self, phases: Sequence[Phase], *, at: Sequence[int], ramp: Sequence[int], end: Callable[[], float]
    ) -> None:
        self.at, self.ramp = list(at), list(ramp)
        self.entries = sorted(map(Entry, at, ramp, phases, range(len(phases))), key=lambda entry: entry.at)
        self._end = end

    def plain(self) -> dict[str, Any]:
        """Steps and phases in the order in which they were given, as plain data."""
        given = sorted(self.entries, key=lambda entry: entry.number)
        return {"at": self.at, "ramp": self.ramp, "phases": [entry.phase.plain() for entry in given]}

    @property
    def start(self) -> int:
        """The step at which quantization begins."""
        return min(entry.at for entry in self.entries if entry.phase.quantize)

    def begins(self, placement: str) -> int | None:
        """The step at which a placement begins to act, or None."""
        return min((entry.at for entry in self.entries if placement in entry.phase.quantize), default=None)

    def observed_from(self, placement: str) -> int | None:
        """The step from which a placement observes by the user's own wish, or None."""
        return min((entry.at for entry in self.entries if placement in entry.phase.observe), default=None)

    def trains(self, step: int) -> str:
        """What gradient descent moves: "all", "weights" or "scales"."""
        said = [entry.phase.train for entry in self.entries if entry.at <= step and entry.phase.train]
        return said[-1] if said else "all"

    def rate(self, step: int, *, scales: bool = False) -> float:
        """What learning rates are multiplied by (those of learned scales when `scales`)."""
        own = self._rate(step, "scale_lr") if scales else None
        return own if own is not None else 1.0 if (rate := self._rate(step, "lr")) is None else rate

    def _rate(self, step: int, name: str) -> float | None:
        named: list[tuple[int, Rate]] = [(e.at, getattr(e.phase, name)) for e in self.entries]
        named = [(at, rate) for at, rate in named if rate is not None]
        if not (said := [entry for entry in named if entry[0] <= step]):
            return None
        begin, rate = said[-1]
        if not isinstance(rate, Schedule):
            return rate
        later = [at for at, _ in named if at > step]
        return rate.factor(step - begin, (later[0] if later else self._end()) - begin)

    @property
    def changes_rates(self) -> bool:
        """Whether any phase names a learning rate."""
        return any(entry.phase.lr is not None or entry.phase.scale_lr is not None for entry in self.entries)

    def strength(self, placement: str, step: int) -> float:
        """The lambda of what acts at a placement."""
        begun = next((entry for entry in self.entries if placement in entry.phase.quantize), None)
        if begun is None or step >= begun.at + begun.ramp:
            return 1.0
        return max(0.0, (step - begun.at + 1) / (begun.ramp + 1))

    def reached(self, before: int, step: int) -> list[Entry]:
        """What begins behind step `before` and not behind `step`."""
        return [entry for entry in self.entries if before < entry.at <= step]


def resolve(
    named: Sequence[tuple[str, Phase]], *, end: Callable[[], float], ordered: bool, rehearsal: bool = False
) -> Timeline:
    """The timeline of a run that begins now.

    Args:
        named: Phases, each with the name of the argument that says its time.
        end: Length of the run in optimizer steps; asked only where it matters.
        ordered: Whether the phases must begin in the order in which they are written.
        rehearsal: The run only tries out that everything runs, and may end before a phase begins.

    Raises:
        ValueError: A phase lies behind the end of the run, or before the one it is written behind.
    """
    at = [_step(name, phase.at, end, rehearsal) for name, phase in named]
    ramp = [_length(step, phase, end, rehearsal) for step, (_, phase) in zip(at, named, strict=True)]
    for index in range(1, len(at) if ordered else 0):
        if at[index] < at[index - 1]:
            raise ValueError(
                f"schedule[{index}] begins at step {at[index]}, before schedule[{index - 1}] at step {at[index - 1]}: "
                "write the phases in the order in which they begin, for example "
                "schedule=[Phase(0, observe='input'), Phase(0.5, quantize='all')]"
            )
    return Timeline([phase for _, phase in named], at=at, ramp=ramp, end=end)


def _step(name: str, value: Any, end: Callable[[], float], rehearsal: bool) -> int:
    if not value:
        return 0
    total = end()
    if isinstance(value, float) and total == float("inf"):
        raise ValueError(
            f"{name}={value}: a share of a run without end; write {name}=1000 for a step, or give the run an end, "
            "Trainer(max_steps=10_000)"
        )
    step = to_steps(value, total)
    if step >= total and not rehearsal:
        raise ValueError(f"{name}={value}: the run ends at step {int(total)}; write for example {name}=0.5")
    return step


def _length(step: int, phase: Phase, end: Callable[[], float], rehearsal: bool) -> int:
    if not phase.ramp:
        return 0
    ramp = to_steps(phase.ramp, end())
    if step + ramp >= end() and not rehearsal:
        raise ValueError(
            f"ramp={phase.ramp}: it reaches full strength at step {step + ramp}, but the run ends at step "
            f"{int(end())}; write for example ramp={(int(end()) - step) // 4}"
        )
    return ramp
