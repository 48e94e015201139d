"""What holds at which step, by hand."""

import math

import pytest

from qlightning.callbacks.phase import Phase
from qlightning.callbacks.timeline import Timeline, resolve
from qlightning.schedules import Constant, Cosine, WarmupStableDecay


def timeline(*phases, end=100, ordered=True, rehearsal=False):
    named = [("at", phase) for phase in phases]
    return resolve(named, end=lambda: end, ordered=ordered, rehearsal=rehearsal)


FIVE = (
    Phase(0, observe="input", lr=0.5),
    Phase(0.2, quantize="weight", lr=1.0),
    Phase(0.4, quantize="input", ramp=4),
    Phase(0.6, train="scales", scale_lr=0.3),
    Phase(0.8, train="weights"),
)


def test_five_phases():
    run = timeline(*FIVE)
    assert run.at == [0, 20, 40, 60, 80]
    assert run.start == 20
    assert (run.begins("weight"), run.begins("input"), run.begins("output")) == (20, 40, None)
    assert (run.observed_from("input"), run.observed_from("weight")) == (0, None)
    assert [run.trains(step) for step in (0, 59, 60, 79, 80, 99)] == ["all"] * 2 + ["scales"] * 2 + ["weights"] * 2
    assert [run.rate(step) for step in (0, 19, 20, 99)] == [0.5, 0.5, 1.0, 1.0]
    assert [run.rate(step, scales=True) for step in (0, 19, 20, 59, 60, 99)] == [0.5, 0.5, 1.0, 1.0, 0.3, 0.3]
    assert [entry.number for entry in run.reached(19, 40)] == [1, 2]
    assert [entry.number for entry in run.reached(-1, 0)] == [0]


def test_a_ramp_is_a_straight_line_to_one():
    run = timeline(*FIVE)
    strengths = [run.strength("input", step) for step in range(38, 47)]
    assert strengths == pytest.approx([0.0, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])
    assert {run.strength("weight", step) for step in range(20, 100)} == {1.0}


def test_a_schedule_as_rate_lives_from_its_phase_to_the_next_that_names_one():
    first, second = WarmupStableDecay(warmup=4, decay=0.5), Cosine(warmup=0)
    run = timeline(Phase(0, lr=first), Phase(40, quantize="all"), Phase(60, lr=second), Phase(70, train="weights"))
    assert [run.rate(step) for step in range(60)] == [first.factor(step, 60) for step in range(60)]
    assert [run.rate(step) for step in range(60, 100)] == [second.factor(step, 40) for step in range(40)]
    assert timeline(Phase(0, lr=Constant(), quantize="all"), end=math.inf).rate(7) == 1.0


def test_phases_in_any_order_when_they_come_from_shorthands():
    run = timeline(Phase(30, quantize="all"), Phase(0, train="weights"), ordered=False)
    assert (run.at, run.start, run.trains(99)) == ([30, 0], 30, "weights")
    assert [entry.number for entry in run.entries] == [1, 0]


def test_known_steps_are_kept():
    run = Timeline([Phase(0.5, quantize="all", ramp=0.1)], at=[7], ramp=[3], end=lambda: 1000)
    assert (run.start, run.strength("weight", 9), run.strength("weight", 10)) == (7, 0.75, 1.0)


def test_a_rehearsal_may_end_early():
    assert timeline(Phase(1000, quantize="all", ramp=50), end=2, rehearsal=True).start == 1000


@pytest.mark.parametrize(
    ("phases", "end", "corrected"),
    [
        (
            [Phase(0.5, quantize="all"), Phase(40, lr=0.1)],
            100,
            r"schedule\[1\] begins at step 40, before schedule\[0\]",
        ),
        ([Phase(100, quantize="all")], 100, "at=100: the run ends at step 100; write for example at=0.5"),
        ([Phase(0.5, quantize="all")], math.inf, r"write at=1000 for a step, or .*Trainer\(max_steps=10_000\)"),
        ([Phase(60, quantize="all", ramp=40)], 100, "ends at step 100; write for example ramp=10"),
        ([Phase(0.0, quantize="all", ramp=0.5)], math.inf, "max_steps"),
    ],
    ids=range(5),
)
def test_what_does_not_fit_the_run(phases, end, corrected):
    with pytest.raises(ValueError, match=corrected):
        timeline(*phases, end=end)
