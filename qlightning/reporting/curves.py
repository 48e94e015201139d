"""Pictures of a run over its steps: step sizes, flips, losses, with its phases shaded."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qlightning.callbacks.report import smoothed
from qlightning.callbacks.trajectory import Sample
from qlightning.reporting.figures import BLUE, CYCLE, DEPTH, Picture, picture, shade, shortened, span_handles
from qlightning.reporting.logs import Curve
from qlightning.reporting.report import Report
from qlightning.reporting.spans import Span

MOST_LINES, MOST_PANELS = 32, 4


def trajectories(report: Report) -> Picture | None:
    """How step sizes moved and codes flipped; None where nothing recorded it."""
    samples, spans = report.run.samples or {}, report.run.spans
    weights = {weight.name for weight in report.weights}
    lines: list[tuple[str, dict[str, Curve]]] = []
    for of, wanted in (("weight", True), ("input", False)):
        names = [name for name in samples if (name in weights) == wanted]
        if found := {name: curve for name in names if (curve := relative(samples[name]))}:
            lines.append((f"median step size of each {of}, relative to its first sample", found))
    if flips := flip_curves(report):
        lines.append(("codes that change in a step (%)", flips))
    if not lines:
        return None
    most = max(len(curves) for _, curves in lines)
    caption = "Medians over each tensor's step sizes; blue lines are the first layers, orange ones the last."
    if most > MOST_LINES:
        caption += f" {MOST_LINES} of {most} are drawn, evenly spaced."
    if spans:
        caption += " Shaded: the phases of the run; the picture begins with the first sample."
    return picture(
        "trajectories",
        "Step sizes and flips over training",
        f"{caption} {_remarks(samples, flips)}".strip(),
        size=(9.5, 2.1 * len(lines) + 0.9),
        draw=lambda figure: _trajectories(figure, lines, spans),
    )


def relative(samples: Sequence[Sample]) -> Curve:
    """The median step size at every sample, over the first."""
    first = next((sample.median for sample in samples if sample.median > 0), None)
    return [] if first is None else [(int(sample.step), sample.median / first) for sample in samples]


def flip_curves(report: Report) -> dict[str, Curve]:
    """Percent of the codes that change in a step; of the TrajectoryCallback, or else of an OscillationCallback."""
    recorded = {
        name: [(int(sample.step), 100 * sample.flips) for sample in samples if math.isfinite(sample.flips)]
        for name, samples in (report.run.samples or {}).items()
    }
    watched = {name: [(step, 100 * flips) for step, flips in curve] for name, curve in report.run.flips.items()}
    return {name: curve for name, curve in recorded.items() if curve} or watched


def _remarks(samples: Mapping[str, Sequence[Sample]], flips: Mapping[str, Curve]) -> str:
    """The two lines that one looks for first, by name."""
    said = []
    moved = {name: curve[-1][1] for name, all_of in samples.items() if (curve := relative(all_of))}
    if far := {name: ratio for name, ratio in moved.items() if ratio > 0}:
        name = max(far, key=lambda n: abs(math.log(far[n])))
        said.append(f"The step size that moved most is that of {name}: {far[name]:.2f} times the first.")
    if last := {name: curve[-1][1] for name, curve in flips.items() if curve}:
        name = max(last, key=lambda n: last[n])
        said.append(f"Most codes flip at the end in {name}: {last[name]:.2g} % in a step.")
    return " ".join(said)


def _trajectories(figure: Any, lines: list[tuple[str, dict[str, Curve]]], spans: list[Span]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    panels = figure.subplots(len(lines), 1, sharex=True, squeeze=False).flatten()
    colors = LinearSegmentedColormap.from_list("depth", DEPTH)
    most = 0
    for axes, (title, curves) in zip(panels, lines, strict=True):
        names = list(curves)
        shown = names[:: -(-len(names) // MOST_LINES)]
        labels = shortened(shown)
        most = max(most, len(names))
        for name, label in zip(shown, labels, strict=True):
            color = colors(names.index(name) / max(1, len(names) - 1))
            steps, values = zip(*curves[name], strict=True)
            single = "o" if len(steps) < 3 else None
            axes.plot(steps, values, color=color, linewidth=1.1, label=label, marker=single, markersize=3)
        axes.set_title(title, loc="left")
        axes.grid(alpha=0.25)
        if title.startswith("codes"):
            axes.set_ylim(bottom=0)
        shade(axes, spans)
    sampled = [step for _, curves in lines for curve in curves.values() for step, _ in curve]
    _limit(panels[-1], min(sampled), max([*sampled, *(span.end for span in spans)]))
    panels[-1].set_xlabel("optimizer step")
    if most > 8:
        bar = figure.colorbar(ScalarMappable(Normalize(1, most), colors), ax=list(panels), aspect=40)
        bar.set_label("in the order of the model")
        bar.outline.set_visible(False)
        handles = []
    else:
        handles = panels[0].get_legend_handles_labels()[0]
    if handles := [*handles, *span_handles(spans)]:
        figure.legend(handles=handles, loc="outside lower center", ncols=3)


def _limit(axes: Any, first: int, last: int) -> None:
    margin = 0.01 * max(1, last - first)
    axes.set_xlim(first - margin, last + margin)


def losses(report: Report) -> Picture | None:
    """Loss curves, and other held-out metrics in panels of their own; None where nothing was logged."""
    curves, panels = report.run.logs.curves, panels_of(report)
    if not panels:
        return None
    spans, caption = report.run.spans, []
    if spans:
        caption.append("Shaded: the phases of the run.")
    if any(len(finite(curves[name])) > 40 for names in panels for name in names):
        caption.append("Thin: as logged; thick: its moving average.")
    broken = {name: len(curve) - len(finite(curve)) for name, curve in curves.items() if finite(curve) != curve}
    caption += [f"{count} values of {name} are not finite and not drawn." for name, count in broken.items()]
    return picture(
        "losses",
        "Losses",
        " ".join(caption),
        size=(9.5, 3.0 + 1.7 * (len(panels) - 1)),
        draw=lambda figure: _losses(figure, panels, curves, spans),
    )


def panels_of(report: Report) -> list[list[str]]:
    """Names of the logged curves that are drawn: losses together, of other held-out metrics the first three alone."""
    known = [name for name, curve in report.run.logs.curves.items() if finite(curve)]
    together = [name for name in known if "loss" in name.lower()][: len(CYCLE)]
    alone = [name for name in known if name.startswith(("val", "test")) and "loss" not in name.lower()]
    return ([together] if together else []) + [[name] for name in alone[: MOST_PANELS - 1]]


def finite(curve: Curve) -> Curve:
    return [(step, value) for step, value in curve if math.isfinite(value)]


def _losses(figure: Any, panels: list[list[str]], curves: dict[str, Curve], spans: list[Span]) -> None:
    heights = [2.0 if len(names) > 1 or index == 0 else 1.2 for index, names in enumerate(panels)]
    every = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights).flatten()
    for index, (axes, names) in enumerate(zip(every, panels, strict=True)):
        for name, color in zip(names, CYCLE if index == 0 else (BLUE,), strict=False):
            _curve(axes, name, finite(curves[name]), color)
        axes.set_ylabel("loss" if len(names) > 1 else names[0].replace("_", " "), fontsize=8)
        axes.grid(alpha=0.25)
        _lower(axes, [finite(curves[name]) for name in names])
        shade(axes, spans)
        if len(names) > 1:
            axes.legend(loc="upper right")
    last = [step for names in panels for name in names for step, _ in curves[name]]
    _limit(every[-1], 0, max([*last, *(span.end for span in spans)]))
    every[-1].set_xlabel("optimizer step")
    if spans:
        figure.legend(handles=span_handles(spans), loc="outside lower center", ncols=3)


def _curve(axes: Any, name: str, curve: Curve, color: str) -> None:
    if len(curve) > 40:
        axes.plot(*zip(*curve, strict=True), color=color, linewidth=0.6, alpha=0.4)
        axes.plot(
            *zip(*smoothed(curve, weight=1 - 40 / len(curve)), strict=True), color=color, linewidth=1.6, label=name
        )
    else:
        axes.plot(*zip(*curve, strict=True), color=color, linewidth=1.4, marker="o", markersize=3, label=name)


def _lower(axes: Any, curves: list[Curve]) -> None:
    """Let the first twentieth of a run, which is far above the rest, not flatten it."""
    last = max(step for curve in curves for step, _ in curve)
    late = [value for curve in curves for step, value in curve if step >= 0.05 * last]
    everything = [value for curve in curves for _, value in curve]
    span = max(late) - min(everything) if late else 0.0
    if span > 0 and max(everything) > max(late) + span:
        axes.set_ylim(min(everything) - 0.05 * span, max(late) + 0.1 * span)
        axes.set_title("the first steps lie above", loc="left", fontsize=7)
