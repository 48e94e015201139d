"""Phases as stretches of steps, against what they were said to be and against real runs."""

import pytest

from qlightning import Phase, QATCallback
from qlightning.callbacks.timeline import resolve
from qlightning.reporting.spans import Span, spans_of, timeline_of


def state(phases, *, total=100, calibration=8):
    named = [("at", phase) for phase in phases]
    return {**resolve(named, end=lambda: total, ordered=True).plain(), "calibration": calibration}


def test_float_then_quantized_then_frozen(kit):
    module = kit.net("int4-g32")
    phases = state([Phase(0.2, quantize="all"), Phase(0.7, train="weights")])
    assert spans_of(phases, module, end=90) == [
        Span(0, 20, "float", "float"),
        Span(20, 70, "quantized", "quantized"),
        Span(70, 90, "scales frozen", "frozen"),
    ]


def test_what_had_not_come_when_it_was_saved_is_left_out(kit):
    phases = state([Phase(0.2, quantize="all"), Phase(0.7, train="weights")])
    assert [span.label for span in spans_of(phases, kit.net(), end=50)] == ["float", "quantized"]
    assert [span.label for span in spans_of(phases, kit.net(), end=10)] == ["float"]


@pytest.mark.parametrize(
    ("phases", "calibrated"),
    [
        ([Phase(0.5, quantize="all")], (42, 50)),
        ([Phase(0, quantize="all")], (0, 8)),
        ([Phase(0.1, observe="input"), Phase(0.3, quantize="all")], (10, 30)),
        ([Phase(0.2, quantize="weight"), Phase(0.6, quantize="input")], (52, 60)),
    ],
)
def test_calibration_lies_over_the_phases(kit, phases, calibrated):
    settled = kit.net({"net.*": {"weight": "int8", "input": "int8-tensor-lsq"}})
    spans = spans_of(state(phases), settled, end=100)
    assert [(s.begin, s.end) for s in spans if s.kind == "calibration"] == [calibrated]
    dynamic = kit.net({"net.*": {"weight": "int8", "input": "int8-token"}})
    assert not [s for s in spans_of(state(phases), dynamic, end=100) if s.kind == "calibration"]


def test_words_for_phases(kit):
    phases = [
        Phase(0.1, quantize="weight"),
        Phase(0.2, quantize=["input", "output"]),
        Phase(0.3, train="scales"),
        Phase(0.4, rules={"net.0": "int2"}),
        Phase(0.5, lr=0.1),
    ]
    labels = [span.label for span in spans_of(state(phases), kit.net(), end=100)]
    wanted = ["weight quantized", "input and output quantized", "only scales train", "other formats"]
    assert labels == ["float", *wanted, "other learning rate"]


def test_it_is_what_a_run_did(kit):
    qat = QATCallback("int4-g32", "int8-tensor-lsq", start=4, calibration=2, freeze_scales=6)
    module = kit.Net()
    kit.fit(module, qat)
    spans = spans_of(qat.described(), module, end=8)
    assert [(span.begin, span.end, span.kind) for span in spans] == [
        (0, 4, "float"),
        (4, 6, "quantized"),
        (6, 8, "frozen"),
        (2, 4, "calibration"),
    ]
    assert timeline_of(qat.described(), end=8).start == 4


def test_without_a_callbacks_state_there_are_none(kit):
    assert spans_of(None, kit.net(), end=5) == []
