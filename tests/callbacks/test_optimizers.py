"""Learned scales in the optimizer: own group, own rate, no decay, under every scheduler and kind of optimization."""

import warnings

import pytest
import torch
from torch.optim import lr_scheduler as schedules

from qlightning import QATCallback
from qlightning.callbacks.optimizers import SCALES, Memory
from qlightning.layers.convert import quantizers_of


def learned(**options):
    return QATCallback("int4-lsq", input="int8-tensor-lsq", **{"calibration": 2, "scale_lr": 0.25, **options})


def groups(trainer, module):
    """(kinds of parameters, lr, weight decay) of every group."""
    scales = {id(p) for _, quantizer in quantizers_of(module) for p in quantizer.parameters()}
    return [
        ({id(p) in scales for p in group["params"]}, float(group["lr"]), group["weight_decay"])
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
    ]


def with_schedule(kit, make, *, interval="step", **config):
    class Scheduled(kit.Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": make(optimizer), "interval": interval, **config},
            }

    return Scheduled()


SCHEDULES = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LambdaLR-list": lambda o: schedules.LambdaLR(o, [lambda step: 1 / (1 + step)]),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedules.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [1, 4], gamma=0.5),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.8),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, total_iters=5),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.05, total_steps=9),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.001, 0.01, step_size_up=2, cycle_momentum=False),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=3), schedules.CosineAnnealingLR(o, 6)], [3]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.LinearLR(o, 0.1, total_iters=3), schedules.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_groups_keep_their_ratio(kit, name):
    module = with_schedule(kit, SCHEDULES[name])
    steps = kit.Record(look=groups)
    kit.fit(module, learned(start=3), steps)
    alone = kit.Record(look=groups)
    kit.fit(with_schedule(kit, SCHEDULES[name]), alone)
    rates = []
    for (weights, scales), (unconverted,) in zip(steps.seen, alone.seen, strict=True):
        assert weights == unconverted
        assert scales[0] == {True}
        assert scales[1] == pytest.approx(0.25 * weights[1], rel=1e-6)
        assert scales[2] == 0.0
        rates.append(weights[1])
    assert len(set(rates)) > 1


def test_reduce_on_plateau(kit):
    """Held-out loss that never gets better: the rate is reduced at each of its checks, down to its floor."""
    module = with_schedule(
        kit,
        lambda o: schedules.ReduceLROnPlateau(o, factor=0.1, patience=0, threshold=1e9, min_lr=1e-4),
        interval="epoch",
        monitor="val_loss",
    )
    steps = kit.Record(look=groups)
    kit.fit(module, learned(), steps, max_steps=-1, max_epochs=5, limit_train_batches=2)
    rates = [(weights[1], scales[1]) for weights, scales in steps.seen[::2]]
    wanted = [0.02, 0.002, 0.0002, 0.0001, 0.0001]
    assert rates == [(pytest.approx(rate), pytest.approx(rate / 4)) for rate in wanted]


@pytest.mark.parametrize("name", ["LambdaLR", "OneCycleLR", "SequentialLR", "CosineAnnealingWarmRestarts"])
def test_schedules_resume(kit, name):
    whole, resumed = kit.Record(look=groups), kit.Record(look=groups)
    kit.fit(with_schedule(kit, SCHEDULES[name]), learned(start=3), whole, kit.every_step(kit.folder))
    save = kit.every_step(kit.folder)
    module = with_schedule(kit, SCHEDULES[name])
    kit.fit(module, learned(start=3), resumed, save, ckpt_path=kit.folder / "step=5.ckpt")
    assert resumed.losses == whole.losses[5:]
    assert resumed.seen == whole.seen[5:]


def test_the_users_own_groups_are_each_split(kit):
    class Grouped(kit.Net):
        def configure_optimizers(self):
            first = {"params": self.net[0].parameters(), "lr": 0.1, "weight_decay": 0.5}
            return torch.optim.AdamW([first, {"params": self.net[2:].parameters(), "betas": (0.5, 0.9)}], lr=0.2)

    module = Grouped()
    trainer = kit.fit(module, learned())
    assert [(lr, decay) for _, lr, decay in groups(trainer, module)] == [
        *((0.1, 0.5), (0.2, 0.01)),
        *((0.025, 0.0), (0.05, 0.0)),
    ]
    optimizer = trainer.optimizers[0]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.999), (0.5, 0.9)] * 2
    assert {id(p) for p in optimizer.param_groups[2]["params"]} == {
        id(q.scale.value) for name, q in quantizers_of(module) if name.startswith("net.0.")
    }


class Alternating:
    """Two optimizers by hand: the last layer's, and the others'."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def own(self, layers):
        return layers.parameters()

    def configure_optimizers(self):
        slow, fast = self.own(self.net[:4]), self.own(self.net[4:])
        return torch.optim.SGD(slow, lr=0.01, momentum=0.9), torch.optim.AdamW(fast, lr=0.02)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return {"loss": loss.detach()}


def test_two_optimizers_by_hand(kit):
    class Both(Alternating, kit.Net):
        pass

    module = Both()
    steps = kit.Record(look=lambda trainer, module: (trainer.global_step, kit.scales(module)))
    trainer = kit.fit(module, learned(start=4, freeze_scales=12, calibration=2), steps, max_steps=16)
    assert [(kinds, lr) for kinds, lr, _ in groups(trainer, module)] == [
        *(({False}, 0.01), ({True}, 0.0025)),
        *(({False}, 0.02), ({True}, 0.005)),
    ]
    moved = {
        step: any(not torch.equal(after[name], before[name]) for name in before)
        for (step, before), (_, after) in zip(steps.seen, steps.seen[1:], strict=False)
    }
    assert moved == {0: False, 2: True, 4: True, 6: True, 8: True, 10: True, 12: False}
    assert steps.losses[-1][1] < steps.losses[0][1]


def test_scales_that_no_optimizer_has_join_their_layers(kit):
    """An adversary's scales must not be moved by the other side's optimizer."""

    class Both(Alternating, kit.Net):
        def own(self, layers):
            return [p for name, p in layers.named_parameters() if name.endswith(("weight", "bias"))]

    module = Both()
    trainer = kit.fit(module, learned(calibration=1), max_steps=4)
    for optimizer, layers in zip(trainer.optimizers, (module.net[:4], module.net[4:]), strict=True):
        (mine,) = [group["params"] for group in optimizer.param_groups if SCALES in group]
        assert {id(p) for p in mine} == {id(q.scale.value) for _, q in quantizers_of(layers)}


def test_scales_of_frozen_layers_are_learned(kit):
    """As under an adapter: no optimizer has the weight, and still its scale is in one."""

    class Head(kit.Net):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.net[4].parameters(), lr=0.02)

    module = Head()
    starts = kit.Record(look=lambda trainer, module: kit.scales(module))
    trainer = kit.fit(module, learned(), starts)
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [1, 6]
    assert not any(torch.equal(value, starts.seen[2][name]) for name, value in kit.scales(module).items())


def test_an_optimizer_that_is_given_twice_is_split_once(kit):
    class Kept(kit.Net):
        optimizer = None

        def configure_optimizers(self):
            self.optimizer = self.optimizer or super().configure_optimizers()
            return self.optimizer

    module = Kept()
    kit.fit(module, learned(), max_steps=4)
    trainer = kit.fit(module, learned(), max_steps=4)
    assert groups(trainer, module) == [({False}, 0.02, 0.1), ({True}, 0.005, 0.0)]


def test_a_rate_that_is_a_tensor(kit):
    class Capturable(kit.Net):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=torch.tensor(0.02))
            return [optimizer], [{"scheduler": schedules.StepLR(optimizer, 2, gamma=0.5), "interval": "step"}]

    module = Capturable()
    steps = kit.Record(look=groups)
    kit.fit(module, learned(), steps)
    for step, (weights, scales) in enumerate(steps.seen):
        assert (weights[1], scales[1]) == (
            pytest.approx(0.02 * 0.5 ** (step // 2)),
            pytest.approx(0.005 * 0.5 ** (step // 2)),
        )


def test_no_scales_no_group(kit):
    module = kit.Net()
    trainer = kit.fit(module, QATCallback("int4-g8"))
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [5]


def test_no_optimizer(kit):
    class Still(kit.Net):
        def configure_optimizers(self):
            return None

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*configure_optimizers.* returned `None`")
        kit.fit(Still(), learned(), max_epochs=1, max_steps=-1)


def test_the_learning_rate_monitor_works(kit):
    from lightning.pytorch.callbacks import LearningRateMonitor
    from lightning.pytorch.loggers import CSVLogger

    monitor = LearningRateMonitor()
    module = with_schedule(kit, SCHEDULES["StepLR"])
    kit.fit(module, learned(), monitor, logger=CSVLogger(kit.folder), log_every_n_steps=1)
    assert monitor.lrs["lr-AdamW/pg2"][0] == pytest.approx(monitor.lrs["lr-AdamW/pg1"][0] / 4)


# --- accumulation and clipping ---


def test_the_switch_waits_for_the_optimizer_step(kit):
    steps = kit.Record(
        look=lambda trainer, module: (trainer.global_step, {q.enabled for _, q in quantizers_of(module)})
    )
    kit.fit(kit.Net(), QATCallback("int4-g8", start=2), steps, accumulate_grad_batches=3, max_steps=4)
    assert steps.seen == [(step, {step >= 2}) for step in range(4) for _ in range(3)]


def test_calibration_sees_every_batch_of_its_steps(kit):
    module = kit.Net()
    counts = kit.Record(
        look=lambda trainer, module: float(module.net[0].input_quantizer.scale.count)  # at the start of each batch
    )
    kit.fit(module, learned(start=3), counts, accumulate_grad_batches=2, max_steps=5)
    assert counts.seen == [0, 0, 0, 1, 2, 3, 4, 4, 4, 4]


def test_clipping_holds_for_scales_too(kit):
    norms = []

    class Watched(kit.Net):
        def on_before_zero_grad(self, optimizer):
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if gradients:
                norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))

    scales = kit.Record(look=lambda trainer, module: kit.scales(module))
    kit.fit(Watched(), learned(), scales, gradient_clip_val=0.01)
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)
    assert not any(torch.equal(scales.seen[-1][name], value) for name, value in scales.seen[2].items())


# --- what optimizers remember ---


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.02),
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
        lambda p: torch.optim.Adagrad(p, lr=0.02, initial_accumulator_value=0.5),
        lambda p: torch.optim.RMSprop(p, lr=0.02),
    ],
)
def test_a_forgotten_parameter_steps_as_for_the_first_time(make):
    def stepped(parameter, optimizer, times):
        for _ in range(times):
            parameter.grad = torch.full_like(parameter, 0.3)
            optimizer.step()
        return parameter.detach().clone()

    fresh = torch.nn.Parameter(torch.ones(3))
    wanted = stepped(fresh, make([fresh]), 2)
    used, other = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = make([used, other])
    memory = Memory([optimizer], [used])
    other.grad = torch.ones(3)
    stepped(used, optimizer, 5)
    kept = {key: value.clone() for key, value in optimizer.state[other].items() if torch.is_tensor(value)}
    with torch.no_grad():
        used.fill_(1.0)
    memory.forget([used])
    other.grad = None
    assert torch.equal(stepped(used, optimizer, 2), wanted)
    assert all(torch.equal(optimizer.state[other][key], value) for key, value in kept.items())


def test_optimizers_forget_scales_at_the_switch(kit):
    """Bypassed scales have stepped with gradient zero; without forgetting, Adam's first real step would be too long."""

    def counts(trainer, module):
        state = trainer.optimizers[0].state
        return {float(state[q.scale.value]["step"]) for _, q in quantizers_of(module) if q.scale.value in state}

    steps = kit.Record(look=counts)
    kit.fit(kit.Net(), learned(start=3, calibration=1), steps, max_steps=7)
    assert steps.seen == [set(), {1.0}, {2.0}, set(), {1.0}, {2.0}, {3.0}]


def test_eight_bit_adam_goes_on_after_the_switch(kit):
    """Its state holds lookup tables: zeroed instead of forgotten, it would never move a scale again."""
    import bitsandbytes

    class EightBit(kit.Net):
        def configure_optimizers(self):
            return bitsandbytes.optim.AdamW8bit(self.parameters(), lr=0.02, min_8bit_size=1)

    scales = kit.Record(look=lambda trainer, module: kit.scales(module))
    trainer = kit.fit(EightBit(), learned(start=3), scales, max_steps=6)
    assert not any(torch.equal(scales.seen[-1][name], value) for name, value in scales.seen[3].items())
    assert {state["state1"].dtype for state in trainer.optimizers[0].state.values()} == {torch.uint8}
