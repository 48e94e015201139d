"""Pictures of models: what is in them, for few and for many layers."""

import math

import pytest

from qlightning.reporting.pictures import chosen, gathered, histograms, layers, scales, unit_of


def test_all_layers_are_named_with_their_numbers(kit):
    report = kit.report({"net.*": "int4-g32", "head": "ternary"})
    drawn = layers(report)
    for part in gathered(report.parts):
        assert part.name.removesuffix(".weight") in drawn.svg
    for weight in report.weights:
        assert f"{weight.sqnr:.1f}" in drawn.svg
        assert f"{weight.bits:.3g}" in drawn.svg
    for words in ("size (kB)", "bits per element", "SQNR (dB)"):
        assert words in drawn.svg


def test_an_exact_weight_is_said_to_be(kit):
    module = kit.net("int4-g32-lsq")
    module.net[0].weight.data = module.net[0].weight_quantizer(module.net[0].weight).detach()
    report = kit.report(module)
    assert report.weights[0].sqnr == math.inf
    assert "exact" in layers(report).svg


def test_small_float_layers_are_put_together(kit):
    report = kit.report()
    together = gathered(report.parts, least=0.05)
    assert together[-1].name.endswith("small float parts")
    assert sum(part.served for part in together) == report.served
    assert gathered(report.parts[:1]) == report.parts[:1]


def test_many_layers_are_points(large):
    drawn = large.pictures["layers"]
    assert "Points are weights" in drawn.caption
    assert "layers.*.up" in drawn.svg
    assert "weights in the order of the model" in drawn.svg


def test_of_many_weights_the_worst_are_shown(large):
    report = large.report
    shown = chosen(report.weights, 24)
    assert len(shown) == 24
    worst = sorted(report.weights, key=lambda weight: weight.sqnr)[:8]
    assert {weight.name for weight in worst} <= {weight.name for weight in shown}
    order = [weight.name for weight in report.weights]
    assert [order.index(weight.name) for weight in shown] == sorted(order.index(weight.name) for weight in shown)
    assert "24 of 120 weights are shown" in large.pictures["weights"].caption
    assert "60 of 120 rows are shown" in large.pictures["scales"].caption


def test_histograms_show_the_grid(kit, monkeypatch):
    from matplotlib.axes import Axes

    lines = []
    monkeypatch.setattr(Axes, "vlines", lambda self, x, *args, **options: lines.append(list(x)))
    drawn = histograms(kit.report({"net.0": "int3-g32", "head": "int8"}))
    assert lines == [[-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]]
    assert "int3-g32, 8 values" in drawn.svg
    assert "int8, 256 values" in drawn.svg
    assert "weight (in step sizes)" in drawn.svg
    assert "evenly spaced elements" not in drawn.caption


def test_nothing_to_draw(kit):
    module = kit.net("int8-lsq")
    for layer in (*module.net, module.head):
        if hasattr(layer, "weight_quantizer"):
            layer.weight_quantizer.enabled = layer.weight_quantizer.scale.ready = False
    report = kit.report(module)
    assert histograms(report) is None
    assert scales(report) is None


def test_step_sizes_are_on_the_axis(small):
    assert "step size (log scale)" in small.pictures["scales"].svg


@pytest.mark.parametrize(("count", "unit"), [(30, "bytes"), (1999, "bytes"), (2000, "kB"), (3e6, "MB"), (1.2e10, "GB")])
def test_units(count, unit):
    assert unit_of(count)[1] == unit


def test_pictures_of_a_stranger_are_text(small):
    for name in ("layers", "weights", "scales"):
        svg = small.pictures[name].svg
        assert "<b>" not in svg
        assert "$x_{&lt;b&gt;$" in svg
