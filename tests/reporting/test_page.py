"""The page: numbers that were computed elsewhere, strangers' text escaped, nothing needed from elsewhere."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from torch import nn

from qlightning import convert
from qlightning.evaluation.size import deployed_bytes, float_bytes
from qlightning.layers.coverage import Row
from qlightning.reporting.drawing import missing
from qlightning.reporting.page import bytes_shown, decibels_shown, page, table


class Outline(HTMLParser):
    """Tables as lists of rows, and every tag with its attributes."""

    VOID = {"meta", "link", "br", "img"}

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.open, self.texts = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def of(report, pictures=()):
    text = page(report, list(pictures), list(missing(report)), "made today")
    return text, Outline(text)


def test_numbers_are_those_computed_by_hand(kit):
    module = kit.Net()
    coverage = convert(module, {"net.*": "int4-g32", "head": "int8"}, min_coverage=0.0)
    text, seen = of(kit.report(module.eval(), coverage=coverage, reasons=True))
    weights = {row[0]: row for row in seen.tables[-1]}
    for name, layer in (("net.0.weight", module.net[0]), ("head.weight", module.head)):
        w, q = layer.weight.detach().numpy(), layer.weight_quantizer(layer.weight).detach().numpy()
        sqnr = 10 * np.log10(np.square(w, dtype=np.float64).sum() / np.square(w - q, dtype=np.float64).sum())
        assert weights[name][7] == f"{sqnr:.2f} dB"
        assert weights[name][3] == f"{w.size:,}"
    assert weights["net.0.weight"][6] == "5.000"
    assert weights["head.weight"][5] == f"{4 * 32 + 4 * 4} bytes"
    everything = sum(p.numel() for p in module.parameters())
    groups = [row[:5] for row in seen.tables[0]]
    assert groups == [
        ["layers", "class", "weights", "share", "quantized, or why not"],
        ["2", "Linear", f"{2 * 2048 + 64:,}", f"{(2 * 2048 + 64) / everything:.1%}", "weight int4-g32"],
        ["1", "Linear", "132", f"{132 / everything:.1%}", "weight int8"],
        ["1", "LayerNorm", "64", f"{64 / everything:.1%}", "float: no matrix"],
        ["1", "Embedding", "512", f"{512 / everything:.1%}", groups[4][4]],
    ]
    assert "type:Embedding" in groups[4][4]
    assert f"{float_bytes(module) / deployed_bytes(module):.2f}x smaller" in text
    assert f"{(2 * 2048 + 128) / everything:.1%}" in text


def test_strangers_text_is_escaped(kit):
    evil = "<script>alert(1)</script>"
    module = nn.ModuleDict({f"a{evil.replace('.', '')}": nn.Linear(8, 8), 'b"onload="x': nn.Linear(8, 8)})
    convert(module, "int8")
    report = kit.report(
        module.eval(),
        title=evil,
        logs=kit.logs(**{f"val_{evil}": [(0, 1.0)], evil: [(0, 2.0)]}),
        measured={"float": {evil: 1.0}},
    )
    report.run.coverage.rows.append(Row("x", evil, 3, reason=evil, rule=evil))
    text, seen = of(report)
    assert "<script" not in text.lower()
    assert evil in "".join(seen.texts)
    assert not [tag for tag in seen.tags if any(name.startswith("on") for name in tag[1])]


def test_it_needs_nothing_from_elsewhere(small):
    text, seen = of(small.report, small.pictures.values())
    for tag, attributes in seen.tags:
        for name in ("src", "href", "xlink:href", "data", "action"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:")), (tag, value)
        assert tag not in ("script", "iframe", "link", "object")
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    anchors = {attributes.get("id") for _, attributes in seen.tags}
    links = {attributes["href"][1:] for tag, attributes in seen.tags if tag == "a"}
    assert links <= anchors
    assert {"coverage", "layers", "weights", "losses", "numbers", "absent"} <= links
    assert "prefers-color-scheme: dark" in text


def test_no_id_stands_twice(small):
    _, seen = of(small.report, small.pictures.values())
    ids = [attributes["id"] for _, attributes in seen.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_what_is_absent_and_what_does_not_act_is_on_the_page(kit):
    module = kit.net("int8")
    module.net[0].weight_quantizer.enabled = False
    _, seen = of(kit.report(module))
    said = "".join(seen.texts)
    assert "no trajectories recorded: add TrajectoryCallback()" in said
    assert "1 quantizers do not act" in said
    assert "net.0.weight (not yet)" in said


def test_comparison(kit):
    measured = {"float": {"loss": 1.0, "megabytes": 4.0}, "rtn": {"loss": 3.0, "megabytes": 1.0}}
    _, seen = of(kit.report(measured=measured))
    assert seen.tables[2] == [["held out", "float", "rounded to nearest"], ["loss", "1", "3"], ["megabytes", "4", "1"]]


def test_a_large_model_is_a_small_page(large):
    text, _ = of(large.report, large.pictures.values())
    assert len(text.encode()) < 1_000_000


def test_cells():
    assert ">&lt;b&gt;<" in table(["a"], [["<b>"]])
    assert bytes_shown(999) == "999 bytes"
    assert bytes_shown(45_000) == "45 kB"
    assert [decibels_shown(value) for value in (None, float("inf"), 3.14159)] == ["", "exact", "3.14 dB"]


@pytest.mark.parametrize("spec", ["ternary", "nvfp4", "int4-g32-lsq"])
def test_every_kind_of_grid_has_a_page(kit, spec):
    _, seen = of(kit.report({"*": spec, "type:Embedding": spec}))
    assert any(row[1] == spec for row in seen.tables[-1])
