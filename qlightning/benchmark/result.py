"""Ratios with their spread, as a table, JSON and Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Row:
    """What was measured of one contestant.

    Attributes:
        name: The contestant.
        seconds: Per step, one number per round; none: it could not be measured.
        saved: Bytes kept for backward, or None.
        peak: Bytes at the highest moment of a step above what lay there before, or None.
        graph_breaks: Under torch.compile, or None.
        why: Why there are no numbers.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    saved: int | None = None
    peak: int | None = None
    graph_breaks: int | None = None
    why: str = ""


@dataclass
class Result:
    """A benchmark.

    Attributes:
        workload: What was trained.
        settings: Of the command.
        machine: Where, when and with which versions.
        rows: The contestants, plain training first.
    """

    workload: str
    settings: Sequence[str]
    machine: Mapping[str, str]
    rows: Sequence[Row]

    def ratios(self, row: Row) -> list[float]:
        """Time of a step in units of plain training's of the same round."""
        return [mine / plain for mine, plain in zip(row.seconds, self.rows[0].seconds, strict=True)]

    def cells(self, row: Row) -> list[str]:
        """The columns of a row."""
        if not row.seconds:
            return [row.name, *[""] * (len(self.columns()) - 2), row.why]
        ratios = sorted(self.ratios(row))
        middle = statistics.median(ratios)
        cells = [row.name, f"{middle:.3f}", f"{ratios[0]:.3f} to {ratios[-1]:.3f}"]
        cells.append(_ratio(row.saved, self.rows[0].saved))
        cells.append(_ratio(row.peak, self.rows[0].peak))
        cells.append("" if row.graph_breaks is None else str(row.graph_breaks))
        return [*cells, ""]

    def columns(self) -> list[str]:
        """The heads of the columns."""
        return ["", "time", "rounds", "saved for backward", "peak memory", "graph breaks", ""]

    def text(self) -> str:
        """A table for a terminal."""
        table = [self.columns(), *(self.cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        return "\n".join([self.title(), *(line.rstrip() for line in lines)])

    def markdown(self) -> str:
        """A section of a report."""
        rows = [self.columns(), ["---"] * len(self.columns()), *(self.cells(row) for row in self.rows)]
        return "\n".join([self.title(), "", *("| " + " | ".join(cells) + " |" for cells in rows)]) + "\n"

    def title(self) -> str:
        """What was measured, where, and what the numbers are."""
        where = ", ".join(self.machine.values())
        return (
            f"{self.workload} ({', '.join(self.settings)}) on {where}. Ratios to plain training of the same weights in "
            "the same round: the median, and the smallest to the largest."
        )

    def json(self) -> dict[str, Any]:
        """Everything that was measured."""
        return asdict(self)


def _ratio(mine: int | None, plain: int | None) -> str:
    return f"{mine / plain:.3f}" if mine is not None and plain else ""
