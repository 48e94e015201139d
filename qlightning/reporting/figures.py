"""How pictures look: one style, drawn once and written twice, as PNG on white and as SVG in the colours of its page."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from qlightning.reporting.spans import Span

# Okabe and Ito's colours, which the colour-blind tell apart; legible on white and on black
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GRAY = "#8A8A8A"
DEPTH = ("#2F86C9", "#A877B5", "#E08A00")  # from the first layer to the last
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
INK = "#010203"  # stands for the text colour of the page, in an SVG

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "savefig.facecolor": "auto",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a layer's name may hold a dollar sign
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "image.interpolation": "none",
}
_SPANS = {"float": (GRAY, 0.14), "quantized": (SKY, 0.22), "frozen": (GREEN, 0.22)}


class Picture(NamedTuple):
    """One picture.

    Attributes:
        name: Of its file, without the suffix.
        title: What it shows.
        caption: How to read it, and what it leaves out.
        png: The picture on white.
        svg: The picture to be put into a page, with the page's colour for text.
    """

    name: str
    title: str
    caption: str
    png: bytes
    svg: str


def picture(
    name: str, title: str, caption: str, *, size: tuple[float, float], draw: Callable[[Any], None], dpi: int = 130
) -> Picture:
    """Draw a picture.

    Args:
        name: Of its file, without the suffix.
        title: What it shows.
        caption: How to read it.
        size: Width and height in inches.
        draw: Puts it into a figure of matplotlib.
        dpi: Dots per inch of the PNG.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=dpi)
        figure.set_layout_engine("none")  # it is laid out, which takes longer than drawing
        figure.patch.set_alpha(0.0)
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return Picture(name, title, caption, png.getvalue(), inline(svg.getvalue(), name))


def inline(svg: str, name: str) -> str:
    """An SVG of matplotlib as a part of a page: without its head, in the page's colours, with ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r"\n\s*", "\n", svg)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg\b[^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "'DejaVu Sans', Verdana, sans-serif", svg)
    return svg.replace(INK, "currentColor").replace("xlink:href", "href")


def shade(axes: Any, spans: Sequence[Span]) -> None:
    """Lay the phases of a run under what is drawn over steps."""
    for span in spans:
        if span.kind == "calibration":
            axes.axvspan(
                span.begin, span.end, facecolor="none", edgecolor=ORANGE, hatch="////", linewidth=0, alpha=0.7, zorder=0
            )
            continue
        color, alpha = _SPANS[span.kind]
        axes.axvspan(span.begin, span.end, color=color, alpha=alpha, linewidth=0, zorder=0)
        if span.begin:
            axes.axvline(span.begin, color=INK, linestyle=":", linewidth=0.8)


def span_handles(spans: Sequence[Span]) -> list[Any]:
    """What a legend says of the phases: each kind once, in the order of time, with its steps."""
    from matplotlib.patches import Patch

    handles = []
    for span in spans:
        label = f"{span.label}, step {span.begin} to {span.end}"
        if span.kind == "calibration":
            handles.append(Patch(facecolor="none", edgecolor=ORANGE, hatch="////", linewidth=0, label=label))
        else:
            color, alpha = _SPANS[span.kind]
            handles.append(Patch(color=color, alpha=2 * alpha, linewidth=0, label=label))
    return handles


def shortened(names: Sequence[str], *, longest: int = 40) -> list[str]:
    """Names without what all of them begin or end with, and no longer than fits beside a picture.

    >>> shortened(["model.layers.0.q.weight", "model.layers.1.k.weight"])
    ['0.q', '1.k']
    """
    parts = [name.removesuffix(".weight").split(".") for name in names]
    if len(names) > 1:
        while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
            parts = [p[1:] for p in parts]
        while all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
            parts = [p[:-1] for p in parts]
    joined = [".".join(p) for p in parts]
    return [name if len(name) <= longest else f"…{name[1 - longest :]}" for name in joined]
