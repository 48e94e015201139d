"""Coverage: what conversion did to every weight of a model, and what it left alone and why."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from torch import nn

from qlightning.layers.layer import Twin, plain_class, twin_for


@dataclass
class Row:
    """One layer.

    Attributes:
        name: Dotted name in the converted module.
        kind: Name of the plain class.
        weights: Number of parameters the layer owns itself, without those an earlier row has counted.
        quantizers: Spec by prefix of the quantizer's name; empty when it stays in float.
        placements: Which of its placements are quantized.
        parts: What it has beside quantizers, by place ("transform", "adapter") or operand of its backward pass.
        rule: Pattern of the rule that decided, if one did.
        reason: Why it stays in float.
        chosen: Whether staying in float was decided by a rule or default (True) or for lack of a twin (False).
        tied_to: Names of the other layers that own its weight.
        multiply_adds: Counted in one forward pass, once `count_multiply_adds` has run.
    """

    name: str
    kind: str
    weights: int
    quantizers: dict[str, str] = field(default_factory=dict)
    placements: tuple[str, ...] = ()
    parts: dict[str, str] = field(default_factory=dict)
    rule: str = ""
    reason: str = ""
    chosen: bool = True
    tied_to: tuple[str, ...] = ()
    multiply_adds: int = 0

    @property
    def weight(self) -> bool:
        """Whether its weight is quantized."""
        return "weight" in self.placements


class Group(NamedTuple):
    """Layers of one class of which the same was done.

    Attributes:
        kind: Name of the plain class.
        shown: What was done, in words.
        rows: The layers, in the model's order.
        weights: Number of their parameters.
        share: That of all parameters.
    """

    kind: str
    shown: str
    rows: list[Row]
    weights: int
    share: float

    @property
    def names(self) -> str:
        return self.rows[0].name if len(self.rows) == 1 else f"{self.rows[0].name} .. {self.rows[-1].name}"


@dataclass
class Coverage:
    """The rows of one conversion, in the model's order.

    Attributes:
        rows: Every layer that owns parameters or has a placement.
    """

    rows: list[Row]

    @property
    def converted(self) -> list[Row]:
        return [row for row in self.rows if row.quantizers]

    @property
    def weight_share(self) -> float:
        """Share of all parameters that lie in converted layers with a quantized weight."""
        return _share(sum(row.weights for row in self.rows if row.weight), sum(row.weights for row in self.rows))

    @property
    def reachable_share(self) -> float:
        """As `weight_share`, but of the parameters that nobody chose to leave in float."""
        open_ = sum(row.weights for row in self.rows if row.quantizers or not row.chosen)
        return _share(sum(row.weights for row in self.converted), open_)

    @property
    def multiply_add_share(self) -> float | None:
        """Share of the counted multiply-adds with a quantized weight; None before they are counted."""
        total = sum(row.multiply_adds for row in self.rows)
        return _share(sum(row.multiply_adds for row in self.rows if row.weight), total) if total else None

    def groups(self) -> list[Group]:
        """Like layers together, the quantized ones first."""
        alike: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            if row.weights or row.quantizers or row.tied_to:
                alike.setdefault((row.kind, _shown(row)), []).append(row)
        total, found = sum(row.weights for row in self.rows), []
        for (kind, shown), rows in sorted(alike.items(), key=lambda item: not item[1][0].quantizers):
            weights = sum(row.weights for row in rows)
            found.append(Group(kind, shown, rows, weights, _share(weights, total)))
        return found

    def plain(self) -> list[dict[str, Any]]:
        """The rows as plain data, for a checkpoint."""
        return [asdict(row) for row in self.rows]

    def table(self) -> str:
        """The table shown to users: like layers on one line, with shares."""
        total = sum(row.weights for row in self.rows)
        cells = [("layers", "class", "weights", "share", "quantized", "names")]
        for group in self.groups():
            numbers = str(len(group.rows)), group.kind, f"{group.weights:,}", f"{group.share:.1%}"
            cells.append((*numbers, group.shown, group.names))
        widths = [max(len(row[i]) for row in cells) for i in range(5)]
        text = "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in cells
        )
        summary = f"quantized: {self.weight_share:.1%} of {total:,} weights"
        if (share := self.multiply_add_share) is not None:
            summary += f", {share:.1%} of the multiply-adds of layers with weights"
        return f"{text}\n{summary}"

    def metrics(self) -> dict[str, float]:
        """What loggers get."""
        metrics = {"coverage/weight_share": self.weight_share, "coverage/layers": float(len(self.converted))}
        if (share := self.multiply_add_share) is not None:
            metrics["coverage/multiply_add_share"] = share
        return metrics


def _shown(row: Row) -> str:
    quantizers = ", ".join(f"{prefix} {spec}" for prefix, spec in (row.quantizers | row.parts).items())
    tied = f"; weight tied to {' and '.join(row.tied_to)}" if row.tied_to else ""
    return (quantizers or f"float: {row.reason}") + tied


def coverage_in(rows: list[dict[str, Any]]) -> Coverage:
    """The coverage that `Coverage.plain` was asked of."""
    return Coverage([Row(**row) for row in rows])


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


@contextmanager
def count_multiply_adds(module: nn.Module, coverage: Coverage) -> Iterator[None]:
    """Count the multiply-adds of every layer with weights in the forward passes made inside the context."""
    rows = {row.name: row for row in coverage.rows}
    handles = []
    for name, layer in module.named_modules():
        twin = twin_for(layer)
        row = rows.get(public_name(name))
        if twin is None or row is None:
            continue

        def count(layer: Any, inputs: Any, named: Any, output: Any, *, row: Row = row, twin: type[Twin] = twin) -> None:
            row.multiply_adds += twin.multiply_adds(layer, (*inputs, *named.values()), output)

        handles.append(layer.register_forward_hook(count, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def public_name(name: str) -> str:
    """The dotted name a user would write: without what torch.compile, checkpoint wrappers and PEFT put in between."""
    hidden = ("_orig_mod", "base_layer", "original_module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
    return ".".join(part for part in name.split(".") if part not in hidden)


def kind_of(module: nn.Module) -> str:
    """The name of a layer's plain class."""
    return (plain_class(module) if isinstance(module, Twin) else type(module)).__name__
