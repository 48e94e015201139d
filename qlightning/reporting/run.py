"""What a checkpoint and the logs beside it say of the run that wrote them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from qlightning.callbacks.trajectory import Sample, read_samples
from qlightning.layers.convert import layers_of, own_parameters
from qlightning.layers.coverage import Coverage, Row, coverage_in, kind_of, public_name
from qlightning.layers.layer import Twin
from qlightning.reporting.logs import Curve, Logs, read_logs
from qlightning.reporting.spans import Span, spans_of
from qlightning.reporting.weights import spec_of


class Run(NamedTuple):
    """One run until now.

    Attributes:
        title: What is reported on.
        step: Optimizer steps taken.
        epoch: Epochs begun.
        coverage: What was converted and what was not; `reasons` says whether it is from the conversion itself.
        reasons: Whether the coverage knows why layers stay in float.
        spans: The phases.
        samples: What a TrajectoryCallback recorded, or None where there was none.
        flips: Curves of flip rates that an OscillationCallback recorded, by weight.
        measured: What a ReportCallback measured, and its switch; empty where there was none.
        logs: What was logged.
    """

    title: str
    step: int
    epoch: int
    coverage: Coverage
    reasons: bool
    spans: list[Span]
    samples: dict[str, list[Sample]] | None
    flips: dict[str, Curve]
    measured: dict[str, dict[str, float]]
    logs: Logs


def run_of(saved: Mapping[str, Any], module: nn.Module, *, title: str, folders: Sequence[Path]) -> Run:
    """The run that a checkpoint is of.

    Args:
        saved: The checkpoint as it is loaded, of which weights and optimizers are not looked at.
        module: The module with its weights.
        title: What is reported on.
        folders: Where its logs may lie; the first that has any is read.
    """
    states: Mapping[str, Any] = saved.get("callbacks") or {}
    qat, report = _state(states, "QATCallback"), _state(states, "ReportCallback")
    trajectory, oscillation = _state(states, "TrajectoryCallback"), _state(states, "OscillationCallback")
    step = int(saved.get("global_step", 0))
    rows = (qat or {}).get("coverage") or []
    logs = read_logs(folders)
    if report is not None and report["train_losses"] and not any("loss" in name for name in logs.curves):
        logs.curves["training loss"] = [(int(at), float(loss)) for at, loss in report["train_losses"]]
        logs.notes.append("The training loss is what ReportCallback kept in the checkpoint.")
    return Run(
        title=title,
        step=step,
        epoch=int(saved.get("epoch", 0)),
        coverage=coverage_in(rows) if rows else seen_in(module),
        reasons=bool(rows),
        spans=spans_of(qat, module, end=step),
        samples=None if trajectory is None else read_samples(trajectory),
        flips={} if oscillation is None else _flips(oscillation),
        measured=_measured(report, folders),
        logs=logs,
    )


def seen_in(module: nn.Module) -> Coverage:
    """The coverage of a converted module as far as it shows by itself: not why a layer stays in float."""
    rows, counted = [], set[int]()
    for name, layer, _ in layers_of(module):
        own = own_parameters(layer)
        quantizers = dict(layer.quantizers()) if isinstance(layer, Twin) else {}
        if not own and not quantizers:
            continue
        weights = sum(p.numel() for p in own if id(p) not in counted)
        counted |= {id(p) for p in own}
        row = Row(public_name(name), kind_of(layer), weights, reason="the checkpoint does not say why")
        if isinstance(layer, Twin):
            row.quantizers = {prefix: spec_of(quantizer) for prefix, quantizer in quantizers.items()}
            row.placements = tuple(p for p in layer.placements if set(layer.prefixes(p)) & set(quantizers))
            row.parts = {at: shown for part in layer.parts() for at, shown in part.shown().items()}
        rows.append(row)
    return Coverage(rows)


def _state(states: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The state of a callback by the name of its class; its key may have arguments behind the name."""
    found = next((key for key in states if key == name or key.startswith(f"{name}{{")), None)
    return None if found is None else states[found]


def _measured(state: Mapping[str, Any] | None, folders: Sequence[Path]) -> dict[str, dict[str, float]]:
    """What ReportCallback measured: the last of it, at the end of the fit, comes after the last checkpoint."""
    measured: dict[str, dict[str, float]] = {} if state is None else dict(state["measured"])
    path = next((path for folder in folders if (path := folder / "report.json").is_file()), None)
    written = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    return measured | {name: written[name] for name in ("float", "rtn", "qat") if name in written}


def _flips(state: Mapping[str, Any]) -> dict[str, Curve]:
    return {name: [(int(row[0]), float(row[1])) for row in rows] for name, rows in state["history"].items()}
