"""Oscillation in Lightning runs: what is logged, damped, frozen and left to move, and that a resumed run goes on."""

import copy
import itertools
import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from qlightning import QATCallback
from qlightning.callbacks.oscillation import ConfidenceAnnealing, OscillationCallback, draw
from qlightning.optim import weights_of
from qlightning.optim.oscillation import elementwise, positions, threshold_distance


class Shaky:
    """Such steps that weights hop to and fro, with momentum and weight decay that go on moving held ones."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.15, momentum=0.5, weight_decay=0.1)


def shaky(kit, **options):
    return type("ShakyNet", (Shaky, kit.Net), {})(**options)


def codes(module):
    return [elementwise(w).codes(w.matrix(), w.state(w.matrix()), None) for w in weights_of(module)]


class Codes(Callback):
    """The codes after every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, *args):
        self.seen.append(codes(module))


def test_what_is_logged_is_what_happened(kit):
    seen, logger = Codes(), CSVLogger(kit.folder)
    watch = OscillationCallback(0.05, 0.2, folder=str(kit.folder / "out"))
    options = {"logger": logger, "log_every_n_steps": 3, "max_steps": 12}
    kit.fit(shaky(kit), QATCallback("int4-channel-lsq"), seen, watch, **options)
    rows = watch.history["net.2.weight"]
    assert [row[0] for row in rows] == [3, 6, 9, 12]
    assert list(watch.history) == ["net.0.weight", "net.2.weight", "net.4.weight"]
    flips = [float((a[1] != b[1]).float().mean()) for a, b in itertools.pairwise(seen.seen)]
    assert rows[0][1] == pytest.approx(sum(flips[:2]) / 2)  # the first step has none before it
    assert rows[2][1] == pytest.approx(sum(flips[5:8]) / 3)
    assert any(row[1] > 0 for row in rows)
    assert all(row[4] == 0 for row in rows)
    logger.save()
    header, *lines = (kit.folder / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("flips/net.2.weight")
    logged = [float(line.split(",")[column]) for line in lines if line.split(",")[column]]
    assert logged == pytest.approx([row[1] for row in rows])
    assert {"oscillating/net.0.weight", "threshold_distance/net.0.weight", "frozen/net.4.weight"} <= set(
        header.split(",")
    )
    assert (kit.folder / "out" / "oscillation.png").stat().st_size > 10_000


def test_watching_changes_nothing(kit):
    plain, watched = shaky(kit), shaky(kit)
    kit.fit(plain, QATCallback("int4-channel-lsq"), max_steps=4)
    kit.fit(watched, QATCallback("int4-channel-lsq"), OscillationCallback(), max_steps=4)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


@pytest.mark.parametrize("spec", ["int4-channel-lsq", "int3-g8"])
def test_dampening_is_the_gradient_of_its_loss(kit, spec):
    """Against autograd of strength * sum (clip(w) - Q(w))^2 with Q(w) held fixed."""

    grads = []

    class Note(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            grads.append([w.parameter.grad.clone() for w in weights_of(module)])

    class Compare(Note):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            super().on_before_optimizer_step(trainer, module, optimizer)
            strength = 0.3 * (1 - math.cos(math.pi * (trainer.global_step + 1) / 4)) / 2
            for w, before, after in zip(weights_of(module), *grads[-2:], strict=True):
                p = w.parameter.detach().requires_grad_()
                step = w.quantizer.grid(p.detach()).step.detach()
                step = step.expand(*step.shape[:-1], p.numel() // step.numel()).reshape(p.shape)
                clipped = p.clamp(w.quantizer.format.low * step, w.quantizer.format.high * step)
                (expected,) = torch.autograd.grad(strength * (clipped - w.quantized()).square().sum(), p)
                torch.testing.assert_close(after - before, expected, rtol=1e-4, atol=2e-6)

    kit.fit(shaky(kit), QATCallback(spec), Note(), OscillationCallback(dampening=0.3), Compare(), max_steps=4)
    assert len(grads) == 8


def test_dampening_brings_weights_to_the_middle_of_their_bins(kit):
    def distance(**options):
        module = shaky(kit)
        kit.fit(module, QATCallback("int4-channel-lsq"), OscillationCallback(**options), max_steps=16)
        return sum(float((w.matrix() - w.quantized()).norm() / w.matrix().norm()) for w in weights_of(module))

    assert distance(dampening=2.0) < 0.7 * distance()


@pytest.mark.parametrize("spec", ["int4-channel-lsq", "int4-channel"])
def test_frozen_weights_stay(kit, spec):
    """Their codes where the scale is learned, their values where it is measured on them; the others go on."""

    class Watch(Callback):
        def __init__(self, freezing):
            self.freezing, self.rows = freezing, []

        def on_train_batch_end(self, trainer, module, *args):
            trackers = self.freezing._trackers
            self.rows.append(
                [
                    (
                        trackers[w.name].frozen.clone(),
                        w.matrix().clone(),
                        c,
                        w.quantized(),
                        trackers[w.name].codes.clone(),
                    )
                    for w, c in zip(weights_of(module), codes(module), strict=True)
                ]
            )

    freezing = OscillationCallback(momentum=0.2, freezing=0.15, freeze_from=3)
    watch = Watch(freezing)
    kit.fit(shaky(kit), QATCallback(spec), freezing, watch, max_steps=16)
    frozen = 0
    for before, after in itertools.pairwise(watch.rows):
        for (held, values, code, *_), (still, new_values, new_code, quantized, seen) in zip(before, after, strict=True):
            assert bool((still >= held).all())
            frozen += int(held.sum())
            if spec.endswith("lsq"):
                assert torch.equal(new_code[held], code[held])
                assert torch.equal(seen[held], code[held])  # and were never seen to flip
                assert torch.equal(new_values[held], quantized[held])  # they sit on the grid
            else:
                assert torch.equal(new_values[held], values[held])
            assert bool((new_values != values)[~still].float().mean() > 0.9)
    assert frozen > 20
    assert not any(bool(held.any()) for held, *_ in watch.rows[2])
    assert any(bool(held.any()) for held, *_ in watch.rows[-1])
    assert not all(bool(held.all()) for held, *_ in watch.rows[-1])


@pytest.mark.parametrize("spec", ["int4-channel-lsq", "int4-channel"])
def test_resume_is_exact(kit, spec):
    def run(**options):
        torch.manual_seed(0)
        record, module = kit.Record(), shaky(kit)
        watch = OscillationCallback(0.05, 0.2, dampening=0.05, freezing=0.15, freeze_from=0.25)
        callbacks = QATCallback(spec, start=1), watch, record, kit.every_step(kit.folder)
        kit.fit(module, *callbacks, **{"max_steps": 8, "log_every_n_steps": 4, **options})
        return record.losses, watch, module

    losses, watch, module = run()
    assert any(bool(tracker.frozen.any()) for tracker in watch._trackers.values())
    for step in (5,) if spec.endswith("lsq") else (2,):
        again, second, resumed = run(ckpt_path=kit.folder / f"step={step}.ckpt")
        assert again == losses[step:]
        assert second.history == watch.history
        for name, value in module.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name
        for name, tracker in watch._trackers.items():
            for key, value in tracker.state_dict().items():
                other = second._trackers[name].state_dict()[key]
                assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, key
    torch.load(kit.folder / "step=5.ckpt", weights_only=True)


def test_codes_of_another_format_begin_anew():
    from torch import nn

    from qlightning import convert, parse

    model = nn.Sequential(nn.Linear(8, 4))
    convert(model, "int8-channel")
    watch = OscillationCallback()
    (weight,) = weights_of(model)
    first = watch._tracker(weight)
    assert watch._tracker(weight) is first
    weight.quantizer.become(parse("int4-channel"))
    assert watch._tracker(weight) is not first


# --- annealing ---


def test_only_weights_near_a_threshold_move(kit):
    """Bit for bit, against momentum and weight decay; which ones is asked anew in every step."""

    class Watch(Callback):
        def __init__(self):
            self.moved, self.masks = [], []

        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.before = []
            for w in weights_of(module):
                v = positions(elementwise(w), w.matrix(), w.state(w.matrix()))
                near = threshold_distance(v, w.quantizer.format) <= 0.1
                self.before.append((near, w.matrix().clone()))

        def on_train_batch_end(self, trainer, module, *args):
            now = [w.matrix() for w in weights_of(module)]
            self.moved.append([b != a for (_, b), a in zip(self.before, now, strict=True)])
            self.masks.append([near for near, _ in self.before])

    watch, module = Watch(), shaky(kit)
    biases = kit.Record(look=lambda trainer, module: module.net[0].bias.detach().clone())
    kit.fit(module, QATCallback("int4-channel-lsq"), watch, ConfidenceAnnealing(0.1, start=3), biases, max_steps=8)
    for step, (moved, near) in enumerate(zip(watch.moved, watch.masks, strict=True)):
        for m, n in zip(moved, near, strict=True):
            if step < 3:
                assert m.float().mean() > 0.9
            else:
                assert not bool((m & ~n).any())
                assert bool((m & n).any()) or not bool(n.any())
    assert any(not torch.equal(a, b) for a, b in zip(watch.masks[4][0], watch.masks[7][0], strict=True))
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(biases.seen))


def test_their_gradients_are_gone_before_clipping(kit):
    norms = []

    class Clipped(Shaky, kit.Net):
        def configure_gradient_clipping(self, optimizer, *args, **kwargs):
            norms.append([float((w.parameter.grad != 0).float().mean()) for w in weights_of(self)])

    kit.fit(Clipped(), QATCallback("int4-channel-lsq"), ConfidenceAnnealing(0.05, start=2), max_steps=4)
    assert min(norms[1]) > 0.5
    assert max(norms[2]) < 0.4


def test_annealing_resumes_and_stays_the_step_it_was(kit):
    def run(**options):
        torch.manual_seed(0)
        record = kit.Record()
        callbacks = QATCallback("int4-channel-lsq"), ConfidenceAnnealing(0.05, start=0.5), record
        kit.fit(shaky(kit), *callbacks, kit.every_step(kit.folder / "run"), **{"max_steps": 8, **options})
        return record.losses

    whole = run()
    longer = run(ckpt_path=kit.folder / "run" / "step=3.ckpt", max_steps=10)
    assert longer[:5] == whole[3:]
    assert whole[4:] != run(max_steps=10)[4:8]


def test_annealing_ends_flips(kit):
    def flips(*callbacks):
        seen = Codes()
        kit.fit(shaky(kit), QATCallback("int3-channel-lsq"), *callbacks, seen, max_steps=16)
        return sum(float((a != b).float().sum()) for a, b in zip(seen.seen[-3], seen.seen[-1], strict=True))

    assert flips(ConfidenceAnnealing(0.02, start=0.3)) < 0.3 * flips()


# --- errors, and the picture ---


def test_what_cannot_work(kit):
    for arguments, message in (
        ({"threshold": 0.0}, r"threshold=0\.0, momentum=0\.01: both in \(0, 1\)"),
        ({"dampening": -1.0}, r"OscillationCallback\(dampening=1e-3\)"),
        ({"freezing": 1.5}, r"for example freezing=0\.02"),
        ({"freeze_from": -1}, "no moment of a run"),
        ({"freeze_from": 0.5}, "freezes nothing: add a frequency"),
    ):
        with pytest.raises(ValueError, match=message):
            OscillationCallback(**arguments)
    with pytest.raises(ValueError, match=r"ConfidenceAnnealing\(boundary=0\.005\)"):
        ConfidenceAnnealing(0.5)
    for callback in (OscillationCallback(), ConfidenceAnnealing()):
        with pytest.raises(ValueError, match=r"nothing is quantized: write Trainer\(callbacks=\[QATCallback"):
            kit.fit(kit.Net(), callback, max_steps=1)
    with pytest.raises(ValueError, match=r"Trainer\(max_steps="):
        kit.fit(kit.Net(), QATCallback("int4"), OscillationCallback(dampening=1.0), max_steps=-1, max_epochs=-1)


def test_the_picture_of_many_layers(tmp_path):
    history = {
        f"layers.{i}.mlp.up_proj.weight": [(step, 0.1 / (1 + i + step), 0.02, 0.25, step / 1000) for step in range(9)]
        for i in range(30)
    }
    before = copy.deepcopy(history)
    draw(history, tmp_path / "picture.png", threshold=0.005)
    assert (tmp_path / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert history == before
