"""CAGE in a Lightning run: the equations on the weights of every step, its schedule, resume, composition."""

import itertools

import pytest
import torch

from qlightning import QATCallback
from qlightning.callbacks.cage import CAGECallback
from qlightning.optim import pull_strength, weights_of


class Momentum:
    """SGD with momentum and a falling learning rate, so that the scheduled rate is told from the first one."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8), "interval": "step"}]


def momentum_net(kit):
    return type("MomentumNet", (Momentum, kit.Net), {})()


def errors(trainer, module):
    """e_t at x_t, and x_t."""
    return [(w.matrix() - w.quantized(), w.parameter.detach().clone()) for w in weights_of(module)]


def test_every_step_is_the_plain_step_minus_the_pull(kit):
    """One step from equal states: the difference of the weights is lr_t * strength_t * e_t, in every step."""

    class Watch(kit.Record):
        """Steps a copy of the optimizer without the pull."""

        def on_train_start(self, trainer, module):
            self.pulls, self.plain = [], []
            (optimizer,) = trainer.optimizers
            self.handle = optimizer.register_step_post_hook(self.stepped)  # before CAGE's own
            self.module, self.trainer = module, trainer

        def stepped(self, optimizer, args, kwargs):
            self.plain.append([w.parameter.detach().clone() for w in weights_of(self.module)])
            self.lr = optimizer.param_groups[0]["lr"]

        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.e = [e for e, _ in errors(trainer, module)]

        def on_train_batch_end(self, trainer, module, *args):
            strength = pull_strength(trainer.global_step - 1, 8, strength=4.0, silence=0.25)
            for w, plain, e in zip(weights_of(module), self.plain[-1], self.e, strict=True):
                torch.testing.assert_close(w.parameter.detach(), plain - self.lr * strength * e, rtol=0, atol=1e-6)
                self.pulls.append(float((w.parameter.detach() - plain).abs().max()))

    watch = Watch()
    kit.fit(momentum_net(kit), QATCallback("int4-channel"), watch, CAGECallback(4.0, 0.25), max_steps=8)
    assert watch.pulls[:6] == [0.0] * 6  # three weights in two silent steps
    assert min(watch.pulls[6:]) > 0


def test_weights_end_nearer_to_the_grid(kit):
    def distance(*callbacks):
        torch.manual_seed(0)
        module = kit.Net()
        kit.fit(module, QATCallback("int4-channel-lsq"), *callbacks, max_steps=20)
        return sum(float((w.matrix() - w.quantized()).norm() / w.matrix().norm()) for w in weights_of(module))

    assert distance(CAGECallback(20.0, 0.2)) < 0.5 * distance()


def test_without_strength_it_is_plain_training_bit_for_bit(kit):
    plain, caged = kit.Net(), kit.Net()
    kit.fit(plain, QATCallback("int4-channel-lsq"), max_steps=4)
    kit.fit(caged, QATCallback("int4-channel-lsq"), CAGECallback(0.0, 0.0), max_steps=4)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, caged.state_dict()[name]), name


@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
def test_resume_is_exact_also_with_accumulation(kit, mode):
    def run(**options):
        record, module = kit.Record(), kit.Net()
        callbacks = QATCallback("int4-channel", start=2), CAGECallback(8.0, 0.3, mode=mode), record
        kit.fit(module, *callbacks, kit.every_step(kit.folder), max_steps=7, accumulate_grad_batches=2, **options)
        return record.losses

    whole = run()
    again = run(ckpt_path=kit.folder / "step=5.ckpt")
    assert again == [(step, loss) for step, loss in whole if step >= 5][1:]
    assert len({loss for _, loss in whole}) > 10


def test_the_pull_begins_with_quantization(kit):
    """During the float phase nothing is pulled, whatever the strength."""
    weights = kit.Record(look=lambda trainer, module: module.net[0].weight.detach().clone())
    plain = kit.Record(look=weights.look)
    kit.fit(kit.Net(), QATCallback("int4-channel", start=4), weights, CAGECallback(8.0, 0.0), max_steps=7)
    kit.fit(kit.Net(), QATCallback("int4-channel", start=4), plain, max_steps=7)
    same = [torch.equal(a, b) for a, b in zip(weights.seen, plain.seen, strict=True)]
    assert same == [True] * 5 + [False] * 2
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(plain.seen))


def test_what_cannot_work(kit):
    with pytest.raises(ValueError, match=r"silence=1\.0: .* CAGECallback\(strength=10\.0, silence=0\.8\)"):
        CAGECallback(silence=1.0)
    with pytest.raises(ValueError, match="ramp='linear' or ramp='none'"):
        CAGECallback(ramp="cosine")
    with pytest.raises(ValueError, match="nothing is quantized"):
        kit.fit(kit.Net(), CAGECallback(), max_steps=2)
    with pytest.raises(ValueError, match=r"Trainer\(max_steps="):
        kit.fit(kit.Net(), QATCallback("int4-channel"), CAGECallback(), max_steps=-1, max_epochs=-1)
    with pytest.raises(ValueError, match=r"times strength .* moves a weight past its grid point"):
        kit.fit(kit.Net(), QATCallback("int4-channel"), CAGECallback(100.0, 0.0, ramp="none"), max_steps=2)
