"""Cooldown fusion: learning rate and quantization share one moment, which is written once (S42)."""

import itertools

import pytest
import torch

from qlightning import QATCallback
from qlightning.callbacks.phase import Phase
from qlightning.schedules import Restart, WarmupStableDecay
from qlightning.tasks.optimizer import adamw


def scheduled(kit, schedule):
    class Scheduled(kit.Net):
        def __init__(self):
            super().__init__()
            self.schedule = schedule

        def configure_optimizers(self):
            return adamw(self, self.schedule, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)

    return Scheduled()


def rates(trainer, module):
    return trainer.optimizers[0].param_groups[0]["lr"] / 0.02, module.net[0].weight_quantizer.enabled


@pytest.mark.parametrize("start", [6, 0.25, 0, [Phase(0, lr=1.0), Phase(9, quantize="all")]], ids=str)
def test_the_decay_starts_where_quantization_starts(kit, start):
    begins = {"schedule": start} if isinstance(start, list) else {"start": start}
    steps = kit.Record(look=rates)
    kit.fit(
        scheduled(kit, WarmupStableDecay(warmup=0, decay="qat")), QATCallback("int4-g8", **begins), steps, max_steps=12
    )
    values, acts = zip(*steps.seen, strict=True)
    first = acts.index(True)
    assert first == {"6": 6, "0.25": 3, "0": 0}.get(str(start), 9)
    assert values == pytest.approx([1.0] * first + [1 - k / (12 - first) for k in range(12 - first)])


def test_two_arms_of_a_comparison(kit):
    """The classic arm decays in float, warms up again and decays again; both switch at the same step."""
    part = WarmupStableDecay(warmup=2, decay=0.5)
    steps = kit.Record(look=rates)
    classic = scheduled(kit, Restart(at="qat", before=part, after=part))
    kit.fit(classic, QATCallback("int4-g8", start=8), steps, max_steps=16)
    values, acts = zip(*steps.seen, strict=True)
    assert acts == (False,) * 8 + (True,) * 8
    assert values == pytest.approx([part.factor(k, 8) for k in range(8)] * 2)


def test_a_longer_resumed_run_keeps_the_moment_and_decays_to_its_own_end(kit):
    folder = kit.folder / "run"
    make = lambda: scheduled(kit, WarmupStableDecay(warmup=0, decay="qat"))  # noqa: E731
    kit.fit(make(), QATCallback("int4-g8", start=0.5), kit.every_step(folder), max_steps=8)
    steps = kit.Record(look=rates)
    callbacks = QATCallback("int4-g8", start=0.5), steps, kit.every_step(folder)
    kit.fit(make(), *callbacks, ckpt_path=folder / "step=2.ckpt", max_steps=12)
    values, acts = zip(*steps.seen, strict=True)
    assert acts == (False, False) + (True,) * 8
    assert values[1:] == pytest.approx([1.0, *(1 - k / 8 for k in range(8))])


def test_any_module_as_a_phase(kit):
    """Without a schedule in the module: the phase that quantizes multiplies the rate; nobody else sees it."""

    class Steps(torch.optim.SGD):
        taken = []

        def step(self, closure=None):
            self.taken.append(self.param_groups[0]["lr"] / 0.02)
            return super().step(closure)

    class Plain(kit.Net):
        def configure_optimizers(self):
            return Steps(self.parameters(), lr=0.02)

    seen = kit.Record(look=rates)
    fused = [
        Phase(0, lr=WarmupStableDecay(warmup=2, decay=0)),
        Phase(5, quantize="all", lr=WarmupStableDecay(0, decay=1.0)),
    ]
    kit.fit(Plain(), QATCallback("int4-g8", schedule=fused), seen, max_steps=10)
    assert Steps.taken == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0, 1.0, *(1 - k / 5 for k in range(5))])
    assert {rate for rate, _ in seen.seen} == {1.0}
    assert all(a >= b for a, b in itertools.pairwise(Steps.taken[2:]))


def test_a_schedule_lets_go_of_the_run(kit):
    schedule = WarmupStableDecay(decay="qat")
    kit.fit(scheduled(kit, schedule), QATCallback("int4-g8", start=2), max_steps=4)
    with pytest.raises(ValueError, match="nobody says when quantization begins"):
        schedule.factor(0, 4)


def test_a_module_without_the_callback(kit):
    with pytest.raises(ValueError, match=r"Trainer\(callbacks=\[QATCallback"):
        kit.fit(scheduled(kit, WarmupStableDecay(decay="qat")), max_steps=4)
