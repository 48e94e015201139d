"""From the facts to pictures, the page and files."""

import datetime
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch

import qlightning
from qlightning.export.artifact import publish, write_manifest
from qlightning.reporting import curves, pictures
from qlightning.reporting.figures import Picture
from qlightning.reporting.page import page
from qlightning.reporting.report import Report

PAGE = "report.html"


def draw(report: Report) -> list[Picture]:
    """All pictures there is something for, in the order of the page."""
    makers = (pictures.layers, pictures.histograms, pictures.scales, curves.trajectories, curves.losses)
    return [drawn for make in makers if (drawn := make(report)) is not None]


def missing(report: Report) -> Iterator[tuple[str, str]]:
    """(What is not shown, why and what to do about it)."""
    run = report.run
    if not run.reasons:
        yield (
            "Why layers stay in float",
            "the checkpoint holds no coverage, which a QATCallback of today writes into it.",
        )
    if not any(weight.histogram for weight in report.weights):
        why = "no quantizer of a weight has a grid yet" if report.weights else "no weight is quantized"
        yield "Histograms of weights", f"{why}."
    if not run.samples:
        said = (
            "no trajectories recorded: add TrajectoryCallback(), Trainer(callbacks=[QATCallback(...), "
            "TrajectoryCallback()])."
            if run.samples is None
            else "no trajectories recorded yet: the run ended before the first step with quantization."
        )
        yield "Step sizes and flips over training", said
    elif not curves.flip_curves(report):
        yield "Flip rates", "no weight has a single code for each element, so none can be said to flip."
    if not (panels := curves.panels_of(report)):
        yield "Losses", "no metrics.csv or TensorBoard event file with losses lies beside the checkpoint: --logs DIR."
    if not run.spans:
        yield "Phases", "the checkpoint does not say when they were, which a QATCallback of today writes into it."
    if dynamic := sum(not facts.steps for facts in report.inputs):
        yield "Step sizes of activations", f"{dynamic} quantizers take theirs from every input anew; none is stored."
    drawn = {name for names in panels for name in names}
    if hidden := [name for name in run.logs.curves if name not in drawn]:
        yield "Other logged metrics", f"{', '.join(hidden[:12])}{' ...' if len(hidden) > 12 else ''}."


def write(report: Report, out: Path, drawn: Sequence[Picture], *, force: bool = False) -> None:
    """Write the page and its pictures into a new folder: `report.html`, PNGs, and the numbers in `qlightning.json`.

    Args:
        report: What is shown.
        out: The folder to be made.
        drawn: Its pictures.
        force: Replace an earlier report there.

    Raises:
        ValueError: There is something at `out`, and `force` is off or it is no report.
    """
    made = (
        f"made {datetime.date.today().isoformat()} with qlightning {qlightning.__version__}, torch "
        f"{torch.__version__}, Lightning {lightning.__version__}"
    )
    text = page(report, drawn, list(missing(report)), made)
    with publish(out, force=force) as folder:
        for picture in drawn:
            (folder / f"{picture.name}.png").write_bytes(picture.png)
        (folder / PAGE).write_text(text, encoding="utf-8")
        write_manifest(folder, {"format": "report", **numbers(report)})


def numbers(report: Report) -> dict[str, Any]:
    """What the page says in numbers, as plain data; no SQNR stands for weights that are exactly on their grid."""
    return {
        "model": report.run.title,
        "step": report.run.step,
        "trained_bytes": report.trained,
        "served_bytes": report.served,
        "quantized_share": report.quantized_share,
        "weights": {
            facts.name: {
                "spec": facts.spec,
                "acts": facts.acts,
                "served_bytes": facts.size.served,
                "bits": facts.bits,
                "sqnr_db": facts.sqnr if facts.sqnr is not None and math.isfinite(facts.sqnr) else None,
            }
            for facts in report.weights
        },
    }
