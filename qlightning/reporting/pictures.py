"""Pictures of a model as it is: its layers, its weights on their grids, its step sizes."""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from qlightning.reporting.figures import BLUE, CYCLE, GRAY, INK, ORANGE, Picture, picture, shortened
from qlightning.reporting.report import Part, Report
from qlightning.reporting.weights import WeightFacts

MOST_BARS, MOST_PANELS, MOST_STRIPS = 64, 24, 100


def layers(report: Report) -> Picture:
    """Size, bits and SQNR of every layer, side by side."""
    parts = gathered(report.parts)
    bars = len(parts) <= MOST_BARS
    draw = _layer_bars if bars else _layer_points
    caption = (
        "Size as served: codes, scales and zero points. Bits: per element, scales included. SQNR: power of the weight "
        "over power of its rounding error; 6 dB are one bit. Layers without SQNR are float."
    )
    height = 1.2 + 0.17 * len(parts) if bars else 7.0
    return picture(
        "layers",
        "Layer by layer: size, bits, SQNR",
        caption if bars else f"{caption} Points are weights in the order of the model, coloured by what they are.",
        size=(9.5, max(2.2, height)),
        draw=lambda figure: draw(figure, parts),
    )


def gathered(parts: Sequence[Part], *, least: float = 0.002) -> list[Part]:
    """Parts in the model's order, with all small ones that are float put together at the end."""
    total = sum(part.trained for part in parts)
    small = [part for part in parts if part.weight is None and part.trained < least * total]
    if len(small) < 2:
        return list(parts)
    rest = Part(
        f"{len(small)} small float parts",
        sum(part.elements for part in small),
        sum(part.trained for part in small),
        sum(part.served for part in small),
        None,
    )
    return [part for part in parts if part not in small] + [rest]


def _layer_bars(figure: Any, parts: list[Part]) -> None:
    from matplotlib.patches import Patch

    size, bits, sqnr = figure.subplots(1, 3, sharey=True, width_ratios=(1.3, 1, 1))
    rows = range(len(parts))
    factor, unit = unit_of(max(part.trained for part in parts))
    size.barh(rows, [part.trained / factor for part in parts], color=GRAY, alpha=0.45, height=0.8)
    served = [part.served / factor for part in parts]
    size.barh(rows, served, color=[_color(part) for part in parts], height=0.5)
    size.set_xlabel(f"size ({unit})")
    size.set_yticks(list(rows), shortened([part.name for part in parts]), fontsize=7)
    size.set_ylim(len(parts) - 0.5, -0.5)
    trained = Patch(color=GRAY, alpha=0.45, label="as trained")
    stored = [Patch(color=BLUE, label="as served, quantized"), Patch(color=ORANGE, label="as served, float")]
    figure.legend(handles=[trained, *stored], loc="outside upper center", ncols=3)
    bits.barh(rows, [part.bits for part in parts], color=[_color(part) for part in parts], height=0.6)
    _numbers(bits, [part.bits for part in parts], "{:.3g}")
    bits.set_xlabel("bits per element")
    known = [part.weight.sqnr if part.weight and part.weight.sqnr is not None else math.nan for part in parts]
    finite = [value for value in known if math.isfinite(value)]
    sqnr.barh(rows, [value if math.isfinite(value) else 0.0 for value in known], color=BLUE, height=0.6)
    _numbers(sqnr, known, "{:.1f}")
    sqnr.set_xlabel("SQNR (dB)")
    sqnr.set_xlim(min([0.0, *finite]) * 1.2, max([1.0, *finite]) * 1.2)
    for axes in (size, bits, sqnr):
        axes.grid(axis="x", alpha=0.25)
        axes.tick_params(axis="y", length=0)


def _numbers(axes: Any, values: Sequence[float], form: str) -> None:
    for row, value in enumerate(values):
        if math.isfinite(value):
            said, at = form.format(value), max(value, 0.0)
        elif value == math.inf:
            said, at = "exact", 0.0
        else:
            continue
        axes.annotate(said, (at, row), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * 1.12)


def _color(part: Part) -> str:
    return BLUE if part.weight is not None else ORANGE


def _layer_points(figure: Any, parts: list[Part]) -> None:
    panels = figure.subplots(3, 1, sharex=True)
    factor, unit = unit_of(max(part.served for part in parts))
    patterns = [re.sub(r"\d+", "*", part.name) for part in parts]
    common = sorted(set(patterns), key=lambda pattern: -patterns.count(pattern))[: len(CYCLE)]
    labels = dict(zip(common, shortened(common), strict=True))
    for axes, values, label in zip(
        panels,
        (
            [part.served / factor for part in parts],
            [part.bits for part in parts],
            [part.weight.sqnr if part.weight and part.weight.sqnr is not None else math.nan for part in parts],
        ),
        (f"size as served ({unit})", "bits per element", "SQNR (dB)"),
        strict=True,
    ):
        for pattern, color in [*zip(common, CYCLE, strict=False), (None, GRAY)]:
            at = [i for i, p in enumerate(patterns) if p == pattern or (pattern is None and p not in common)]
            name = "others" if pattern is None else labels[pattern]
            axes.plot(at, [values[i] for i in at], "o", color=color, markersize=3.5, label=name)
        axes.set_ylabel(label)
        finite = [value for value in values if math.isfinite(value)] or [1.0]
        axes.set_ylim(1.08 * min(0.0, *finite), 1.08 * max(0.0, *finite) or 1.0)
        axes.grid(alpha=0.25)
    panels[-1].set_xlabel("weights in the order of the model")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def unit_of(largest: float) -> tuple[float, str]:
    """A unit in which a number of bytes reads well: (bytes in it, name)."""
    return next((u for u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if largest >= 2 * u[0]), (1.0, "bytes"))


# --- weights on their grids ---


def chosen(weights: Sequence[WeightFacts], most: int) -> list[WeightFacts]:
    """At most so many weights: a third of them those with the lowest SQNR, the rest evenly spaced; in order."""
    drawable = [weight for weight in weights if weight.histogram is not None]
    if len(drawable) <= most:
        return drawable
    worst = sorted(range(len(drawable)), key=lambda i: drawable[i].sqnr or 0.0)[: most // 3]
    others = [i for i in range(len(drawable)) if i not in set(worst)]
    spread = {others[round(k * (len(others) - 1) / (most - len(worst) - 1))] for k in range(most - len(worst))}
    return [drawable[i] for i in sorted({*worst, *spread})]


def histograms(report: Report) -> Picture | None:
    """Histograms of weights with the grid drawn in; None where no weight has a grid yet."""
    shown, known = chosen(report.weights, MOST_PANELS), sum(w.histogram is not None for w in report.weights)
    if not shown:
        return None
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    caption = (
        "Blue: density of the weights. Vertical lines: the values that can be stored; dots: the share of the weights "
        "that is rounded to each. Where the lines would be too many, the range is marked. In units of step sizes (0 is "
        "the code of zero, or zero point), of each element's own block."
    )
    if any(w.histogram and w.histogram.elements < w.size.elements for w in shown):
        caption += " Of large weights, at most 262,144 evenly spaced elements are counted."
    if len(shown) < known:
        caption += f" {len(shown)} of {known} weights are shown: those with the lowest SQNR, and others evenly spaced."
    return picture(
        "weights",
        "Weights on their grids",
        caption,
        size=(2.4 * columns + 0.2, 1.55 * rows + 0.35),
        draw=lambda figure: _histograms(figure, shown, rows, columns),
    )


def _histograms(figure: Any, shown: list[WeightFacts], rows: int, columns: int) -> None:
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    names = shortened([weight.name for weight in shown], longest=30)
    for axes, weight, name in zip(panels, shown, names, strict=False):
        found = weight.histogram
        assert found is not None
        axes.stairs(found.density, found.edges, fill=True, color=BLUE, alpha=0.65, linewidth=0)
        if found.on_level:
            axes.vlines(found.levels, 0, 1, color=INK, alpha=0.35, linewidth=0.6, transform=axes.get_xaxis_transform())
            axes.plot(found.levels, found.on_level, "o", color=ORANGE, markersize=3, markeredgewidth=0)
        else:
            axes.axvline(found.levels[0], color=INK, alpha=0.5, linewidth=0.8)
            axes.axvline(found.levels[-1], color=INK, alpha=0.5, linewidth=0.8)
        axes.set_title(f"{name}\n{_brief(weight.spec)}, {len(found.levels)} values", fontsize=7)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlim(found.edges[0], found.edges[-1])
        axes.set_ylim(bottom=0)
        axes.tick_params(axis="x", labelsize=7)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    units = sorted({weight.histogram.unit for weight in shown if weight.histogram})
    figure.supxlabel(f"weight ({' or '.join(_UNITS[unit] for unit in units)})", fontsize=8)
    figure.supylabel("density, share per unit", fontsize=8)


_UNITS = {"step sizes": "in step sizes", "weight": "as it is, where it has no single code"}


def _brief(spec: str) -> str:
    return spec if len(spec) <= 26 else f"{spec[:25]}…"


# --- step sizes ---


def scales(report: Report) -> Picture | None:
    """The histogram of the step sizes of every weight and settled input, one row each; None where there are none."""
    rows = [(weight.name, weight.steps) for weight in report.weights if weight.steps]
    rows += [(found.name, found.steps) for found in report.inputs if found.steps]
    positive = [(name, [step for step in steps if step > 0]) for name, steps in rows]
    positive = [(name, steps) for name, steps in positive if steps]
    if not positive:
        return None
    spread = range(0, len(positive), -(-len(positive) // MOST_STRIPS))
    shown = [positive[i] for i in spread]
    caption = (
        "One row for each weight (and each input whose scale is settled): how its step sizes are spread, the fuller "
        "the blue the more of them; orange: the median. At most 4,096 evenly spaced step sizes each."
    )
    if len(shown) < len(positive):
        caption += f" {len(shown)} of {len(positive)} rows are shown, evenly spaced."
    height = 1.1 + (0.17 if len(shown) <= MOST_BARS else 0.07) * len(shown)
    return picture(
        "scales", "Step sizes", caption, size=(9.5, max(1.8, height)), draw=lambda figure: _strips(figure, shown)
    )


def _strips(figure: Any, shown: list[tuple[str, list[float]]]) -> None:
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    logs = [torch.tensor(steps, dtype=torch.float64).log10() for _, steps in shown]
    low, high = min(float(t.min()) for t in logs), max(float(t.max()) for t in logs)
    pad = 0.04 * (high - low) or 0.2
    edges = torch.linspace(low - pad, high + pad, 141, dtype=torch.float64)
    counts = torch.stack([torch.histogram(t, edges)[0] for t in logs])
    share = counts / counts.amax(1, keepdim=True)
    axes = figure.add_subplot()
    image = share.masked_fill(share == 0, math.nan).sqrt()
    shades = LinearSegmentedColormap.from_list("blues", [to_rgba(BLUE, 0.15), to_rgba(BLUE, 1.0)])
    extent = (float(edges[0]), float(edges[-1]), len(shown) - 0.5, -0.5)
    axes.imshow(image.numpy(), aspect="auto", extent=extent, cmap=shades, vmin=0, vmax=1)
    for row, t in enumerate(logs):
        axes.vlines(float(t.median()), row - 0.4, row + 0.4, color=ORANGE, linewidth=2)
    if len(shown) <= MOST_BARS:
        axes.set_yticks(range(len(shown)), shortened([name for name, _ in shown]), fontsize=7)
        axes.tick_params(axis="y", length=0)
    else:
        axes.set_ylabel("rows in the order of the model")
    axes.set_xlabel("step size (log scale)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{10**value:.2g}")
    axes.grid(axis="x", alpha=0.25)
