"""What a calibration did to every weight and to every block's output."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class SiteRow:
    """One weight. Losses are shares of the layer's squared output on the calibration data.

    Attributes:
        name: Of the weight.
        shape: Output channels and fan-in.
        tokens: Rows of input its moments are of.
        before: Loss of rounding to nearest.
        after: Loss of the solution.
        changed: Share of weights that differ from rounding to nearest.
        damping: What was added to the Hessian's diagonal, in units of its mean.
        seconds: Time of the solver.
        note: Why it was left as it is, or what must be known of it.
    """

    name: str
    shape: tuple[int, int]
    tokens: int = 0
    before: float | None = None
    after: float | None = None
    changed: float | None = None
    damping: float | None = None
    seconds: float = 0.0
    note: str = ""


@dataclass
class BlockRow:
    """One block.

    Attributes:
        name: Of the block.
        error: Squared difference of its output in the calibrated and in the float model, as a share of the latter.
    """

    name: str
    error: float


@dataclass
class CalibrationReport:
    """The report of one calibration.

    Attributes:
        solver: The solver as it was called.
        batches: Number of batches used.
        sites: Every quantized weight, in the order in which they were solved.
        blocks: Every block, in the order in which they run.
        states: What solutions off their quantizer's grid are stored as, by weight.
    """

    solver: str
    batches: int
    sites: list[SiteRow] = field(default_factory=list)
    blocks: list[BlockRow] = field(default_factory=list)
    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def table(self) -> str:
        """The table shown to users."""
        head = ("weight", "shape", "tokens", "rounding", "solved", "changed", "damping", "seconds", "note")
        cells = [head, *(_cells(row) for row in self.sites)]
        blocks = [("block", "output error"), *((row.name, f"{row.error:.3g}") for row in self.blocks)]
        return f"{self.solver} on {self.batches} batches\n{_aligned(cells)}\n\n{_aligned(blocks)}"

    def state(self) -> dict[str, Any]:
        """Plain data and tensors, for a checkpoint."""
        return asdict(self)

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state()` gave."""
        self.sites = [SiteRow(**{**row, "shape": tuple(row["shape"])}) for row in state["sites"]]
        self.blocks = [BlockRow(**row) for row in state["blocks"]]
        self.states = {name: dict(tensors) for name, tensors in state["states"].items()}


def _cells(row: SiteRow) -> tuple[str, ...]:
    shape = f"{row.shape[0]} x {row.shape[1]}"
    changed = "" if row.changed is None else f"{row.changed:.1%}"
    numbers = ("" if value is None else f"{value:.3g}" for value in (row.before, row.after))
    damping = "" if row.damping is None else f"{row.damping:.2g}"
    return (row.name, shape, f"{row.tokens:,}", *numbers, changed, damping, f"{row.seconds:.2f}", row.note)


def _aligned(cells: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)
