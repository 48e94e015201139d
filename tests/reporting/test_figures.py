"""Pictures as parts of a page: in its colours, with ids of their own, needing nothing from elsewhere."""

import io
import re
from xml.etree import ElementTree

from PIL import Image

from qlightning.reporting.figures import INK, inline, picture, shade, shortened, span_handles
from qlightning.reporting.spans import Span


def draw(figure):
    axes = figure.add_subplot(xlabel="x <&> $y$")
    axes.stairs([1, 2], [0, 1, 2], label="<script>alert(1)</script>")
    axes.legend()
    spans = [Span(0, 1, "float", "float"), Span(1, 2, "calibration", "calibration")]
    shade(axes, spans)
    figure.legend(handles=span_handles(spans))


def test_an_svg_fits_into_a_page():
    drawn = picture("some", "Title", "", size=(3, 2), draw=draw)
    root = ElementTree.fromstring(drawn.svg)  # sound XML
    assert root.attrib["viewBox"]
    assert "width" not in root.attrib
    assert INK not in drawn.svg
    assert "currentColor" in drawn.svg
    assert "<script" not in drawn.svg
    assert "x &lt;&amp;&gt; $y$" in drawn.svg  # text, and no formula
    assert not re.search(r"https?:", drawn.svg.replace("http://www.w3.org/", ""))
    assert "float, step 0 to 1" in drawn.svg


def test_ids_of_two_pictures_differ_and_references_follow():
    one, two = (picture(name, "", "", size=(3, 2), draw=draw).svg for name in ("one", "two"))
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, two)]
    assert not ids[0] & ids[1]
    for svg, own in zip((one, two), ids, strict=True):
        assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)) != set()
        assert {a or b for a, b in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)} <= own


def test_the_same_twice_is_the_same():
    assert picture("a", "", "", size=(3, 2), draw=draw) == picture("a", "", "", size=(3, 2), draw=draw)


def test_a_png_is_on_white():
    image = Image.open(io.BytesIO(picture("a", "", "", size=(3, 2), draw=draw, dpi=50).png))
    assert image.size == (150, 100)
    assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_inline_keeps_no_head():
    head = '<?xml version="1.0"?><!DOCTYPE svg>'
    svg = head + '<svg width="1pt" viewBox="0 0 1 1"><metadata>x</metadata></svg>'
    assert inline(svg, "a") == '<svg viewBox="0 0 1 1" role="img"></svg>'


def test_names_are_shortened_only_by_what_they_share():
    assert shortened(["a.b.0.q.weight", "a.b.10.q.weight"]) == ["0", "10"]
    assert shortened(["a.b.0.q.weight", "a.b.0.k.weight", "a.head"]) == ["b.0.q", "b.0.k", "head"]
    assert shortened(["one.two"]) == ["one.two"]
    (long,) = shortened(["x" * 80])
    assert len(long) == 40
