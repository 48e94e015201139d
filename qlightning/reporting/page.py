"""The page: one HTML file that needs nothing beside it, in the colours of the reader's system.

Whatever comes out of a checkpoint or a log is a stranger's text until it has gone through `html.escape`.
"""

import html
import math
from collections.abc import Sequence
from string import Template

from qlightning.layers.coverage import Row
from qlightning.reporting.figures import Picture
from qlightning.reporting.pictures import unit_of
from qlightning.reporting.report import Part, Report
from qlightning.reporting.weights import InputFacts

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff; --soft: #5a5a5a; --line: #d8d8d8; --tile: #f4f4f2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181b; --soft: #a8a8a8; --line: #3a3d42; --tile: #212429; }
}
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); font-size: .9rem; }
.absent { border-left: 3px solid #D55E00; padding: .2rem .8rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1rem 0; }
.tile { background: var(--tile); border-radius: 6px; padding: .6rem .9rem; min-width: 9rem; flex: 1; }
.tile b { display: block; font-size: 1.35rem; }
.tile span { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { text-align: left; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { overflow-wrap: anywhere; min-width: 9rem; }
svg { width: 100%; height: auto; color: var(--ink); } figure { margin: .6rem 0; }
summary { cursor: pointer; margin: .5rem 0; } nav a { color: inherit; margin-right: .9rem; }
</style>
</head>
<body>
$body
</body>
</html>
""")


def page(report: Report, pictures: Sequence[Picture], absent: Sequence[tuple[str, str]], made: str) -> str:
    """The whole page.

    Args:
        report: What is shown.
        pictures: Drawn of it.
        absent: (title, why, and what to do) of what could not be shown.
        made: With what and when it was made.
    """
    run = report.run
    sections = [
        ("coverage", "What is quantized", _coverage(report)),
        *([("comparison", "Float, rounded, trained", _comparison(run.measured))] if run.measured else []),
        *((p.name, p.title, _figure(p)) for p in pictures),
        ("numbers", "All numbers", _numbers(report.parts) + _inputs(report.inputs)),
        *([("absent", "What is not shown", "".join(_absent(*item) for item in absent))] if absent else []),
    ]
    links = "".join(f'<a href="#{name}">{html.escape(title)}</a>' for name, title, _ in sections)
    body = "\n".join(f'<h2 id="{name}">{html.escape(title)}</h2>\n{text}' for name, title, text in sections)
    head = (
        f"<h1>{html.escape(run.title)}</h1>\n"
        f'<p class="soft">step {run.step:,}, epoch {run.epoch:,}; {html.escape(made)}</p>\n{_tiles(report)}\n'
        f'<nav class="soft">{links}</nav>\n'
    )
    files = ", ".join(path.name for path in run.logs.files) or "none"
    foot = "".join(f'<p class="soft">{html.escape(note)}</p>' for note in [f"Logs read: {files}.", *run.logs.notes])
    return _PAGE.substitute(title=html.escape(run.title), body=f"{head}{body}\n{foot}")


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: Sequence[int] = ()) -> str:
    """An HTML table; every cell is escaped.

    Args:
        head: Of the columns.
        rows: Their cells.
        numbers: Columns that are numbers.
    """

    def cells(row: Sequence[object], tag: str) -> str:
        return "".join(
            f'<{tag} class="{"n" if i in numbers else "name"}">{html.escape(str(cell))}</{tag}>'
            for i, cell in enumerate(row)
        )

    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    top = f"<thead><tr>{cells(head, 'th')}</tr></thead>"
    return f'<div class="wide"><table>{top}<tbody>\n{body}\n</tbody></table></div>'


def bytes_shown(count: float) -> str:
    """A number of bytes with its unit.

    >>> bytes_shown(3_281_408)
    '3.28 MB'
    """
    factor, unit = unit_of(count)
    return f"{count / factor:.3g} {unit}" if factor > 1 else f"{count:.0f} bytes"


def decibels_shown(value: float | None) -> str:
    """An SQNR with its unit."""
    return "" if value is None else "exact" if value == math.inf else f"{value:.2f} dB"


def _tiles(report: Report) -> str:
    smaller = report.trained / max(1, report.served)
    worst = report.worst
    elements = sum(w.size.elements for w in report.weights)
    bits = 8 * sum(w.size.served for w in report.weights) / elements if elements else 0.0
    tiles = [
        (f"{smaller:.2f}x smaller", f"{bytes_shown(report.trained)} trained, {bytes_shown(report.served)} served"),
        (f"{report.quantized_share:.1%}", f"of all parameters quantized, {len(report.weights)} weights"),
        (f"{bits:.2f} bits", "per quantized weight, scales included"),
    ]
    if worst is not None:
        tiles.append((decibels_shown(worst.sqnr), f"lowest SQNR, {worst.name}"))
    shown = "".join(f'<div class="tile"><b>{html.escape(b)}</b><span>{html.escape(s)}</span></div>' for b, s in tiles)
    return f'<div class="tiles">{shown}</div>'


def _figure(picture: Picture) -> str:
    return f'<figure>{picture.svg}<figcaption class="soft">{html.escape(picture.caption)}</figcaption></figure>'


def _absent(title: str, why: str) -> str:
    return f'<p class="absent"><b>{html.escape(title)}</b>: {html.escape(why)}</p>'


def _coverage(report: Report) -> str:
    coverage = report.run.coverage
    rows = [
        (len(group.rows), group.kind, f"{group.weights:,}", f"{group.share:.1%}", group.shown, group.names)
        for group in coverage.groups()
    ]
    text = table(("layers", "class", "weights", "share", "quantized, or why not", "names"), rows, numbers=(0, 2, 3))
    acts = [*((w.name, w.acts) for w in report.weights), *((i.name, i.acts) for i in report.inputs)]
    idle = [f"{name} ({state})" for name, state in acts if state != "acts"]
    if idle:
        text += _absent(f"{len(idle)} quantizers do not act", f"{', '.join(idle[:6])}{' ...' if len(idle) > 6 else ''}")
    if (share := coverage.multiply_add_share) is not None:
        text += f'<p class="soft">{share:.1%} of the multiply-adds of layers with weights have a quantized weight.</p>'
    return text + _every_layer(coverage.rows)


def _every_layer(rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        quantizers = ", ".join(f"{prefix} {spec}" for prefix, spec in (row.quantizers | row.parts).items())
        why = "" if row.quantizers else row.reason
        cells.append((row.name or "(the model itself)", row.kind, f"{row.weights:,}", quantizers, row.rule, why))
    head = ("layer", "class", "weights", "quantized", "rule", "why not")
    return f"<details><summary>every layer</summary>{table(head, cells, numbers=(2,))}</details>"


def _comparison(measured: dict[str, dict[str, float]]) -> str:
    """What ReportCallback measured on held-out data."""
    names = [name for name in ("float", "rtn", "qat") if name in measured]
    titles = {"float": "float", "rtn": "rounded to nearest", "qat": "trained quantized"}
    keys = list(dict.fromkeys(key for name in names for key in measured[name]))
    rows = [(key, *(f"{measured[name].get(key, math.nan):.4g}" for name in names)) for key in keys]
    text = table(("held out", *(titles[name] for name in names)), rows, numbers=range(1, len(names) + 1))
    return f'{text}<p class="soft">Measured by ReportCallback: the first two at the switch, the last at the end.</p>'


def _numbers(parts: Sequence[Part]) -> str:
    rows = []
    for part in parts:
        weight = part.weight
        steps = [] if weight is None else weight.steps
        shape = "" if weight is None else " x ".join(map(str, weight.shape))
        rows.append(
            (
                *(part.name, "float" if weight is None else weight.spec, shape, f"{part.elements:,}"),
                *(bytes_shown(part.trained), bytes_shown(part.served), f"{part.bits:.3f}"),
                "" if weight is None else decibels_shown(weight.sqnr),
                f"{steps[len(steps) // 2]:.3g}" if steps else "",
            )
        )
    head = ("weight or layer", "spec", "shape", "elements", "trained", "served", "bits", "SQNR", "median step size")
    return f"<details><summary>every weight</summary>{table(head, rows, numbers=(3, 4, 5, 6, 7, 8))}</details>"


def _inputs(inputs: Sequence[InputFacts]) -> str:
    if not inputs:
        return ""
    rows = []
    for facts in inputs:
        step = f"{facts.steps[len(facts.steps) // 2]:.3g}" if facts.steps else "each input its own"
        rows.append((facts.name, facts.spec, facts.acts, step))
    head = ("placement", "spec", "acts", "median step size")
    return f"<details><summary>every activation quantizer</summary>{table(head, rows, numbers=(3,))}</details>"
