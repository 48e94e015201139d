"""What is trained is the sum that is written down, in whatever order callbacks come and however steps are made."""

from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import ManualOptimBoringModel

from qlightning import QATCallback
from qlightning.callbacks.extra_loss import ExtraLoss


class Size(ExtraLoss):
    """The sum of the squares of a layer's weight."""

    def __init__(self, layer=0, *, weight=0.3, name="size", task_weight=None):
        super().__init__(weight=weight, name=name, task_weight=task_weight)
        self.layer, self.found = layer, None

    def prepare(self, trainer, pl_module):
        self.found = pl_module.net[self.layer].weight

    @contextmanager
    def watch(self, trainer, pl_module, arguments, options):
        yield lambda: self.found.square().sum()

    def release(self):
        self.found = None


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def by_hand(kit, factors, task=1.0):
    """The module that a user would have written."""

    class ByHand(kit.Net):
        def training_step(self, batch, batch_idx):
            total = self.loss(batch) * task if task else 0
            for layer, factor in factors.items():
                total = total + self.net[layer].weight.square().sum() * factor
            return total

    return ByHand()


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=["plain", "accumulated", "bf16"]
)
def test_as_if_written_by_hand(kit, options):
    module, hand = kit.Net(), by_hand(kit, {0: 0.3, 2: 0.05})
    one, two = kit.Record(), kit.Record()
    kit.fit(module, Size(), Size(2, weight=0.05, name="other"), one, max_steps=4, **options)
    kit.fit(hand, two, max_steps=4, **options)
    assert one.losses == two.losses
    assert same(weights(module), weights(hand))
    plain = kit.Net()
    kit.fit(plain, max_steps=4, **options)
    assert not same(weights(module), weights(plain))


@pytest.mark.parametrize("first", [True, False])
def test_one_replaces_the_task_and_leaves_the_others(kit, first):
    module, hand = kit.Net(), by_hand(kit, {0: 0.3, 2: 0.05}, task=0)
    callbacks = Size(task_weight=0.0), Size(2, weight=0.05, name="other")
    kit.fit(module, *callbacks[:: 1 if first else -1], max_steps=3)
    kit.fit(hand, max_steps=3)
    for name, value in weights(hand).items():
        assert torch.allclose(weights(module)[name], value, rtol=1e-6)


def test_the_task_is_weighed(kit):
    module, hand = kit.Net(), by_hand(kit, {0: 0.3}, task=0.25)
    kit.fit(module, Size(task_weight=0.25), max_steps=3)
    kit.fit(hand, max_steps=3)
    assert same(weights(module), weights(hand))


def test_kinds_of_steps(kit):
    """A dict, a skipped batch, a step without batch_idx, one called by name."""

    class Dict(kit.Net):
        def training_step(self, batch):
            return {"loss": self.loss(batch), "more": 3}

    class Skips(kit.Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else self.loss(batch)

    class Each(Callback):
        def __init__(self, record):
            self.record = record

        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            self.record.seen.append(bool(outputs))

    class Sees(kit.Record):
        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            self.seen.append(outputs and outputs.get("more"))

    hand, sees = by_hand(kit, {0: 0.3}), Sees()
    kit.fit(hand, max_steps=3)
    module = Dict()
    kit.fit(module, Size(), sees, max_steps=3)
    assert same(weights(module), weights(hand))
    assert sees.seen == [3, 3, 3]
    record = kit.Record()
    with pytest.warns(UserWarning, match="returned `None`"):
        trainer = kit.fit(Skips(), Size(), Each(record), max_steps=-1, max_epochs=1)
    assert record.seen == [True, False] * 3
    assert "size" in trainer.callback_metrics


def test_what_is_logged_is_the_loss_before_its_weight(kit):
    module, size = kit.Net(), Size()
    before = float(module.net[0].weight.detach().square().sum())
    trainer = kit.fit(module, size, max_steps=1)
    assert float(trainer.callback_metrics["size"]) == pytest.approx(before, rel=1e-6)


def test_the_module_gets_its_step_back(kit):
    module = kit.Net()
    kit.fit(module, Size(), Size(2, name="other"), max_steps=1)
    assert "training_step" not in vars(module)

    class Fails(kit.Record):
        def on_train_batch_end(self, *args):
            raise RuntimeError("stop")

    own = module.training_step = lambda batch, batch_idx: module.loss(batch)
    own.__wrapped__ = kit.Net.training_step
    with pytest.raises(RuntimeError, match="stop"):
        kit.fit(module, Size(), Fails())
    assert vars(module)["training_step"] is own


@pytest.mark.parametrize("first", [True, False])
def test_beside_quantization(kit, first):
    module, hand = kit.Net(), by_hand(kit, {0: 0.3})
    callbacks = Size(), QATCallback("int4-g8", start=2)
    kit.fit(module, *callbacks[:: 1 if first else -1], max_steps=4)
    kit.fit(hand, QATCallback("int4-g8", start=2), max_steps=4)
    assert same(weights(module), weights(hand))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [Size(weight=0.0)], r"weight=0.0: above 0"),
        (lambda: [Size(task_weight=-1.0)], r"write 1.0 to add to the task's loss, or 0.0 to replace it"),
        (lambda: [Size(), Size(2)], r"log their loss as 'size'.*name='size_2'"),
        (
            lambda: [Size(task_weight=0.0), Size(2, name="other", task_weight=1.0)],
            r"task_weight=0.0.*task_weight=1.0: write the same",
        ),
    ],
)
def test_errors(kit, make, message):
    with pytest.raises(ValueError, match=message):
        kit.fit(kit.Net(), *make(), max_steps=1)


def test_steps_that_no_callback_can_add_to(kit):
    with pytest.raises(ValueError, match=r"optimizes by hand.*manual_backward"):
        kit.trainer(Size()).fit(ManualOptimBoringModel())

    class Fetches(kit.Net):
        def training_step(self, dataloader_iter):
            return self.loss(next(dataloader_iter)[0])

    with (
        pytest.raises(ValueError, match=r"Fetches.training_step fetches its batches itself"),
        pytest.warns(UserWarning, match="dataloader_iter"),
    ):
        kit.fit(Fetches(), Size())
