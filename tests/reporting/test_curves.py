"""Curves over steps: what is drawn is what was recorded and logged."""

import math

import pytest

from qlightning.callbacks.trajectory import Sample
from qlightning.reporting.curves import flip_curves, losses, panels_of, relative, trajectories
from qlightning.reporting.drawing import missing
from qlightning.reporting.spans import Span

SPANS = [
    Span(0, 20, "float", "float"),
    Span(20, 40, "quantized", "quantized"),
    Span(12, 20, "calibration", "calibration"),
]


def samples(*rows):
    return [Sample(step, median / 2, median, 2 * median, flips) for step, median, flips in rows]


@pytest.fixture
def recorded():
    return {
        "net.0.weight": samples((20, 0.5, 0.04), (30, 0.25, 0.02)),
        "net.2.weight": samples((20, 0.1, 0.01), (30, 0.11, 0.03)),
        "net.0.input": samples((20, 2.0, math.nan), (30, 3.0, math.nan)),
    }


def test_numbers(kit, recorded):
    report = kit.report(samples=recorded, spans=SPANS)
    assert relative(recorded["net.0.weight"]) == [(20, 1.0), (30, 0.5)]
    assert flip_curves(report) == {"net.0.weight": [(20, 4.0), (30, 2.0)], "net.2.weight": [(20, 1.0), (30, 3.0)]}
    drawn = trajectories(report)
    assert "moved most is that of net.0.weight: 0.50 times the first" in drawn.caption
    assert "Most codes flip at the end in net.2.weight: 3 % in a step" in drawn.caption
    for words in ("step size of each weight", "step size of each input", "codes that change in a step (%)"):
        assert words in drawn.svg
    assert "calibration, step 12 to 20" in drawn.svg


def test_curves_are_drawn_as_they_are(kit, recorded, monkeypatch):
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, **o: (drawn.append((tuple(x), tuple(y))), plot(self, x, y, **o))[1]
    )
    trajectories(kit.report(samples=recorded))
    assert drawn == [((20, 30), y) for y in ((1.0, 0.5), (1.0, 0.11 / 0.1), (1.0, 1.5), (4.0, 2.0), (1.0, 3.0))]


def test_what_an_oscillation_callback_saw_stands_in(kit, recorded):
    watched = {"net.0.weight": [(5, 0.5)]}
    assert flip_curves(kit.report(flips=watched)) == {"net.0.weight": [(5, 50.0)]}
    assert "net.2.weight" in flip_curves(kit.report(flips=watched, samples=recorded))
    assert trajectories(kit.report(flips=watched)) is not None
    assert trajectories(kit.report()) is None


def test_of_many_lines_some_are_drawn(kit):
    recorded = {f"l{i}.input": samples((0, 1.0, math.nan), (1, 1.0 + i, math.nan)) for i in range(100)}
    drawn = trajectories(kit.report(samples=recorded))
    assert "32 of 100 are drawn" in drawn.caption
    assert drawn.svg.count("<path") < 400
    assert "in the order of the model" in drawn.svg


def test_losses_together_and_others_apart(kit):
    curves = {
        "train_loss": [(step, 3 - step / 50) for step in range(100)],
        "val_loss": [(50, 2.0), (99, 1.0)],
        "val_accuracy": [(50, 0.5)],
        "lr": [(0, 1.0)],
    }
    drawn = losses(kit.report(logs=kit.logs(**curves), spans=SPANS))
    for words in ("train_loss", "val_loss", "val accuracy", "optimizer step", "quantized, step 20 to 40"):
        assert words in drawn.svg
    assert ">lr<" not in drawn.svg
    assert "moving average" in drawn.caption
    assert losses(kit.report(logs=kit.logs(lr=[(0, 1.0)]))) is None


def test_what_is_drawn_and_what_is_only_named(kit):
    names = ["val_a", "loss", "val_b", "val_c", "lr", "val_d", "val_loss"]
    report = kit.report(logs=kit.logs(**{name: [(0, 1.0)] for name in names}))
    assert panels_of(report) == [["loss", "val_loss"], ["val_a"], ["val_b"], ["val_c"]]
    assert dict(missing(report))["Other logged metrics"] == "lr, val_d."


def test_a_diverged_loss_is_said(kit):
    drawn = losses(kit.report(logs=kit.logs(train_loss=[(0, 1.0), (1, math.nan), (2, math.inf)])))
    assert "2 values of train_loss are not finite" in drawn.caption
    assert losses(kit.report(logs=kit.logs(train_loss=[(0, math.nan)]))) is None


def test_the_first_steps_do_not_flatten_the_rest(kit):
    steep = [(step, 1000.0 if step < 2 else 2 - step / 100) for step in range(100)]
    assert "the first steps lie above" in losses(kit.report(logs=kit.logs(train_loss=steep))).svg
    flat = [(step, 2 - step / 100) for step in range(100)]
    assert "the first steps lie above" not in losses(kit.report(logs=kit.logs(train_loss=flat))).svg
