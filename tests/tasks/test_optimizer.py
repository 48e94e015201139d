import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from qlightning.schedules import Constant, Cosine
from qlightning.tasks import adamw


class Recorder(BoringModel):
    """A user's own module on the shared optimizer; remembers the learning rate of every step."""

    def __init__(self, schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.norm = nn.LayerNorm(2)
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.rates = []

    def forward(self, x):
        return self.norm(super().forward(x))

    def on_train_batch_start(self, batch, batch_idx):
        self.rates.append(self.optimizers().param_groups[0]["lr"])

    def configure_optimizers(self):
        return adamw(self, self.schedule, lr=0.5, betas=(0.9, 0.95), weight_decay=0.1)


def test_the_schedule_is_followed_step_by_step_over_accumulated_batches(trainer):
    schedule = Cosine(warmup=2, floor=0.1)
    module = Recorder(schedule)
    run = trainer(max_epochs=2, limit_train_batches=6, limit_val_batches=0, accumulate_grad_batches=2)
    run.fit(module)
    assert run.global_step == 6
    assert module.rates == pytest.approx([0.5 * schedule.factor(i // 2, 6) for i in range(12)])


def test_decay_acts_on_matrices_only_and_frozen_parameters_stay_out(trainer):
    module = Recorder(Constant())
    run = trainer(max_steps=1, limit_val_batches=0)
    run.fit(module)
    decayed, plain = run.optimizers[0].param_groups
    assert [p.ndim for p in decayed["params"]] == [2]
    assert decayed["weight_decay"] == 0.1
    assert [p.ndim for p in plain["params"]] == [1, 1, 1]
    assert plain["weight_decay"] == 0.0
    assert decayed["betas"] == plain["betas"] == (0.9, 0.95)


def test_the_checkpoint_holds_nothing_of_the_schedule_but_its_place(trainer, tmp_path):
    run = trainer(max_steps=3, limit_val_batches=0)
    run.fit(Recorder(Cosine()))
    run.save_checkpoint(tmp_path / "run.ckpt")
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)["lr_schedulers"][0]
    assert state["last_epoch"] == 3
    assert state["lr_lambdas"] == [None, None]


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="requires_grad=True"):
        adamw(LightningModule(), Constant(), lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)


def test_a_run_without_an_end_is_an_error(trainer):
    with pytest.raises(ValueError, match=r"set trainer\.max_steps"):
        trainer(max_epochs=-1, limit_val_batches=0).fit(Recorder(Cosine()))
