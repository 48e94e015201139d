"""Exact values, and agreement with torch and transformers where the conventions meet."""

import itertools
import math

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_wsd_schedule

from qlightning.schedules import Constant, Cosine, Restart, Schedule, WarmupStableDecay

EVERY = [
    Constant(warmup=3),
    Cosine(warmup=0.1, floor=0.05),
    WarmupStableDecay(warmup=4, decay=0.25, floor=0.1),
    Restart(at=0.75, before=Cosine(), after=Restart(at=0.4, before=Constant(), after=Cosine(warmup=2)), peak=0.2),
]


def peer(make, steps: int) -> list[float]:
    """The factors a torch scheduler gives, read off an optimizer of learning rate 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    factors = []
    for _ in range(steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


def factors(schedule: Schedule, steps: int, total: float) -> list[float]:
    return [schedule.factor(step, total) for step in range(steps)]


def test_cosine_equals_torch():
    expected = peer(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=40, eta_min=0.1), 41)
    assert factors(Cosine(warmup=0, floor=0.1), 41, 40) == pytest.approx(expected, abs=1e-12)


def test_cosine_equals_transformers_after_the_warmup():
    # the warmups differ on purpose: transformers spends its first step at learning rate 0, ours does not
    expected = peer(lambda o: get_cosine_schedule_with_warmup(o, 7, 50), 51)
    ours = factors(Cosine(warmup=7), 51, 50)
    assert ours[7:] == pytest.approx(expected[7:], abs=1e-12)
    assert ours[:8] == pytest.approx([s / 8 for s in range(1, 9)])
    assert expected[0] == 0.0


def test_warmup_stable_decay_equals_transformers():
    def make(optimizer):
        return get_wsd_schedule(
            optimizer, 5, 10, num_stable_steps=35, decay_type="linear", warmup_type="linear", min_lr_ratio=0.1
        )

    ours = factors(WarmupStableDecay(warmup=5, decay=0.2, floor=0.1), 51, 50)
    assert ours[5:] == pytest.approx(peer(make, 51)[5:], abs=1e-12)
    assert ours[:6] == pytest.approx([s / 6 for s in range(1, 7)])


def test_constant_warms_up_and_needs_no_length():
    assert factors(Constant(), 3, math.inf) == [1.0, 1.0, 1.0]
    assert factors(Constant(warmup=3), 5, math.inf) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_restart_runs_each_part_over_its_own_phase():
    before, after = Cosine(warmup=2), WarmupStableDecay(warmup=1, decay=0.5)
    both = Restart(at=0.6, before=before, after=after, peak=0.25)
    assert factors(both, 50, 50) == [
        *factors(before, 30, 30),
        *[0.25 * f for f in factors(after, 20, 20)],
    ]
    assert factors(Restart(at=30, before=before, after=after, peak=0.25), 50, 50) == factors(both, 50, 50)


def begun(schedule: Schedule, start: int) -> Schedule:
    schedule.bind(lambda: start)
    return schedule


def test_the_fused_cooldown_has_one_peak_and_no_jump():
    """S42: warmup, stable, and from the first quantized step on one straight decay."""
    values = factors(begun(WarmupStableDecay(warmup=5, decay="qat"), 60), 101, 100)
    assert values[5:61] == [1.0] * 56
    assert all(a < b for a, b in itertools.pairwise(values[:6]))
    assert all(a > b for a, b in itertools.pairwise(values[60:]))
    assert values[60:] == pytest.approx([1 - k / 40 for k in range(41)])
    assert max(abs(a - b) for a, b in itertools.pairwise(values[5:])) == pytest.approx(1 / 40)
    assert values == factors(WarmupStableDecay(warmup=5, decay=40), 101, 100)


def test_the_classic_arm_warms_up_twice():
    """S42: each phase with its own warmup and its own decay to zero."""
    part = WarmupStableDecay(warmup=4, decay=0.5)
    values = factors(begun(Restart(at="qat", before=part, after=part, peak=0.5), 60), 100, 100)
    assert values == [*factors(part, 60, 60), *(0.5 * value for value in factors(part, 40, 40))]
    peaks = [k for k in range(1, 99) if values[k - 1] < values[k] >= values[k + 1]]
    assert peaks == [4, 64]


def test_a_run_that_ends_before_quantization_begins_does_not_decay():
    assert factors(begun(WarmupStableDecay(warmup=0, decay="qat"), 500), 3, 3) == [1.0] * 3


def test_where_quantization_begins_is_no_argument():
    told = begun(WarmupStableDecay(decay="qat"), 3)
    assert told == WarmupStableDecay(decay="qat")
    assert Schedule.of(told.plain()) == told
    assert repr(told) == "WarmupStableDecay(warmup=0.05, decay='qat', floor=0.0)"
    told.bind(None)
    with pytest.raises(ValueError, match=r"callbacks=\[QATCallback\(\.\.\., start=0.8\)\]"):
        told.factor(0, 10)


@pytest.mark.parametrize("schedule", EVERY, ids=repr)
@pytest.mark.parametrize("total", [4, 7, 100])
def test_factors_stay_between_zero_and_one(schedule, total):
    values = factors(schedule, total + 3, total)
    assert all(0 <= v <= 1 for v in values)
    assert all(v > 0 for v in values[:total])


@pytest.mark.parametrize("schedule", EVERY, ids=repr)
def test_the_plain_form_holds_plain_values_and_gives_the_schedule_back(schedule):
    import yaml

    form = yaml.safe_load(yaml.safe_dump(schedule.plain()))
    assert Schedule.of(form) == schedule
    assert Schedule.of(schedule) is schedule
    assert eval(repr(schedule)) == schedule


def test_different_schedules_are_not_equal():
    assert Cosine(floor=0.1) != Cosine(floor=0.2)
    assert Constant(warmup=0) != Cosine(warmup=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Cosine(floor=1.5), "floor=0.1"),
        (lambda: WarmupStableDecay(floor=-0.1), "floor=0.1"),
        (lambda: Restart(at=0.5, before=Constant(), after=Constant(), peak=0), "peak=0.2"),
        (lambda: Restart(at=70, before=Constant(), after=Constant()).factor(0, 70), "at=0.75"),
        (lambda: Cosine(warmup=3).factor(0, math.inf), "max_steps"),
        (lambda: WarmupStableDecay(warmup=3, decay=3).factor(0, math.inf), "max_steps"),
        (lambda: WarmupStableDecay(decay="quant"), "decay='qat'"),
        (lambda: Restart(at="qad", before=Constant(), after=Constant()), "at='qat'"),
        (
            lambda: Restart(at=0.5, before=Constant(), after=WarmupStableDecay(decay="qat")),
            r"Restart\(at='qat', \.\.\.\)",
        ),
        (lambda: Cosine(warmup=-3).factor(0, 10), "write steps"),
    ],
)
def test_errors_show_the_corrected_call(call, message):
    with pytest.raises(ValueError, match=message):
        call()
