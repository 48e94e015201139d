"""`measure` says what Lightning's own validation says, and leaves no trace in the run."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics import MeanMetric, MeanSquaredError, MetricCollection

from qlightning.data.loader import Loader
from qlightning.evaluation.measure import measure
from qlightning.evaluation.random_state import random_state


def rows(count=10, seed=0):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.sum(1, keepdim=True))


class Net(LightningModule):
    """Batches of 4, 4 and 2: means over batches must be weighted."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))

    def loss(self, batch):
        return (self.net(batch[0]).float() - batch[1].float()).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Measure(Callback):
    """Measures at the start of the second step."""

    def __init__(self, **options):
        self.options, self.values = options, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1:
            self.before(pl_module, trainer)
            self.values = measure(trainer, pl_module, **self.options)
            self.after(pl_module, trainer)

    def before(self, pl_module, trainer): ...

    def after(self, pl_module, trainer): ...


def make_trainer(*callbacks, **options):
    return Trainer(
        callbacks=list(callbacks),
        **{
            **{"accelerator": "cpu", "max_steps": 2, "logger": False, "enable_checkpointing": False},
            **{"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0},
            **options,
        },
    )


def both(module, val=None, *, measured=None, frozen=True, **options):
    """(what `measure` says inside a fit, what `Trainer.validate` says of the same weights)."""
    callback = measured or Measure()
    if frozen:  # the weights must still be the same when validate looks at them
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    val = val if val is not None else Loader(rows(), batch_size=4)
    make_trainer(callback, **options).fit(module, Loader(rows(8, seed=1), batch_size=4), val)
    found = make_trainer(**options).validate(module, val, verbose=False)
    return callback.values, {name: value for one in found for name, value in one.items()}


def check(module, val=None, **options):
    mine, lightnings = both(module, val, **options)
    assert mine == pytest.approx(lightnings, rel=1e-6)
    return mine


def test_a_plain_loss():
    module = Net()
    values = check(module)
    x, y = rows().tensors
    module.eval()
    with torch.no_grad():
        assert values == {"val_loss": pytest.approx(float((module.net(x) - y).square().mean()), rel=1e-6)}


class Many(Net):
    """Everything that `log` can be told."""

    def __init__(self):
        super().__init__()
        self.mse, self.mean = MeanSquaredError(), MeanMetric()
        self.several = MetricCollection({"a": MeanSquaredError(), "b": MeanSquaredError(squared=False)}, prefix="many_")

    def validation_step(self, batch, batch_idx):
        x, y = batch
        y_ = self.net(x)
        self.mse.update(y_, y)
        self.several.update(y_, y)
        self.log("metric", self.mse)
        self.log_dict(self.several)
        self.log("plain", y_.mean())
        self.log("unweighted", y_.mean(), batch_size=1)
        self.log("sum", y_.sum(), reduce_fx="sum")
        self.log("largest", y_.max(), reduce_fx=torch.max)
        self.log("smallest", y_.min(), False, None, None, None, "min")
        self.log_dict({"one": 1.0, "index": torch.tensor(float(batch_idx))}, prog_bar=False)
        self.mean.update(y_)

    def on_validation_epoch_end(self):
        self.log("at_end", self.mean.compute())
        self.mean.reset()


def test_everything_log_can_be_told():
    values = check(Many())
    assert set(values) == {
        *("metric", "many_a", "many_b", "plain", "unweighted", "sum", "largest", "smallest", "one", "index", "at_end")
    }
    assert values["index"] == pytest.approx((0 * 4 + 1 * 4 + 2 * 2) / 10)


def test_several_loaders():
    class Two(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.log("val_loss", self.loss(batch))
            self.log(f"own_{dataloader_idx}", self.loss(batch), add_dataloader_idx=False)

    for loaders in (
        [Loader(rows(), batch_size=4), Loader(rows(6, seed=5), batch_size=4)],
        {"a": Loader(rows(), batch_size=4), "b": Loader(rows(6, seed=5), batch_size=4)},
    ):
        values = check(Two(), loaders)
        assert set(values) == {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1", "own_0", "own_1"}


def test_a_step_without_batch_index():
    class Short(Net):
        def validation_step(self, batch):
            self.log("val_loss", self.loss(batch))

    check(Short())


@pytest.mark.parametrize("batch", [dict, list])
def test_batches_of_other_kinds(batch):
    class Other(Net):
        def loss(self, batch):
            x, y = batch.values() if isinstance(batch, dict) else batch
            return (self.net(x) - y).square().mean()

    def collate(items):
        x, y = torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])
        return {"x": x, "y": y} if batch is dict else [x, y]

    check(Other(), Loader(rows(), batch_size=4, collate_fn=collate))


@pytest.mark.parametrize("limit", [1, 2, 0.4])
def test_limited_validation(limit):
    check(Net(), limit_val_batches=limit)


def test_at_most_so_many_batches():
    wanted = check(Net(), limit_val_batches=2)
    for limit in (1.0, 2):
        mine, _ = both(Net(), measured=Measure(max_batches=2), limit_val_batches=limit)
        assert mine == pytest.approx(wanted)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_precision(precision):
    check(Net(), precision=precision)


def test_transfer_hooks_of_module_and_data():
    class Hooked(Net):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 2, batch[1]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] + 1, batch[1]

    plain, hooked = check(Net()), check(Hooked())
    assert hooked["val_loss"] != pytest.approx(plain["val_loss"])


def test_a_datamodule():
    class Data(LightningDataModule):
        def train_dataloader(self):
            return Loader(rows(8, seed=1), batch_size=4)

        def val_dataloader(self):
            return Loader(rows(), batch_size=4)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0], batch[1] + 1

    module, callback = Net(), Measure()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    make_trainer(callback).fit(module, Data())
    (lightnings,) = make_trainer().validate(module, Data(), verbose=False)
    assert callback.values == pytest.approx(lightnings, rel=1e-6)


# --- no trace ---


class Careful(Measure):
    def before(self, pl_module, trainer):
        pl_module.net[2].eval()
        self.state, self.modes = random_state(), [m.training for m in pl_module.modules()]
        self.metrics, self.loggers = dict(trainer.callback_metrics), list(trainer.loggers)
        self.names = set(vars(pl_module))

    def after(self, pl_module, trainer):
        now = random_state()
        assert torch.equal(now["torch"], self.state["torch"])
        assert now["python"] == self.state["python"]
        assert torch.equal(now["numpy"][1], self.state["numpy"][1])
        assert [m.training for m in pl_module.modules()] == self.modes
        assert dict(trainer.callback_metrics) == self.metrics
        assert trainer.loggers == self.loggers
        assert set(vars(pl_module)) == self.names
        assert all(p.requires_grad for p in pl_module.parameters())
        self.done = True


class Drawing(Many):
    """A validation that draws random numbers, uses its logger itself and keeps metrics."""

    def validation_step(self, batch, batch_idx):
        random.random(), np.random.normal(), torch.rand(1)
        assert not self.training
        assert not torch.is_grad_enabled()
        super().validation_step(batch, batch_idx)
        if self.logger is not None:
            self.logger.log_metrics({"by_hand": 1.0}, step=batch_idx)


def test_modes_generators_loggers_and_metrics(tmp_path):
    def run(callback):
        module = Drawing()
        torch.manual_seed(3)
        logger = CSVLogger(tmp_path, version=str(callback))
        trainer = make_trainer(*([callback] if callback else []), max_steps=4, logger=logger, log_every_n_steps=1)
        trainer.fit(module, Loader(rows(8, seed=1), batch_size=4), Loader(rows(), batch_size=4))
        return module, (tmp_path / "lightning_logs" / str(callback) / "metrics.csv").read_text()

    careful = Careful()
    with_measure, logged = run(careful)
    without, alone = run(None)
    assert careful.done
    assert len(careful.values) == 11
    assert logged == alone
    for name, value in without.state_dict().items():
        assert torch.equal(with_measure.state_dict()[name], value)


def test_an_error_in_validation_leaves_no_trace_either():
    class Broken(Net):
        def validation_step(self, batch, batch_idx):
            torch.rand(1)
            raise KeyError("mine")

    class Trying(Careful):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before(pl_module, trainer)
            with pytest.raises(KeyError, match="mine"):
                measure(trainer, pl_module)
            self.after(pl_module, trainer)

    trying = Trying()
    trainer = make_trainer(trying, max_steps=1)
    trainer.fit(Broken(), Loader(rows(8, seed=1), batch_size=4), Loader(rows(), batch_size=4))
    assert trying.done


# --- what cannot be measured ---


def test_no_validation_data():
    class Trainable(Net):
        validation_step = LightningModule.validation_step

    corrected = r"trainer.fit\(module, train_dataloaders=..., val_dataloaders=...\), with limit_val_batches above 0"
    train, val = Loader(rows(8, seed=1), batch_size=4), Loader(rows(), batch_size=4)
    with pytest.raises(ValueError, match=corrected):
        make_trainer(Measure()).fit(Trainable(), train)
    with pytest.raises(ValueError, match=corrected):
        make_trainer(Measure(), limit_val_batches=0).fit(Net(), train, val)


def test_a_module_that_logs_nothing():
    class Silent(Net):
        def validation_step(self, batch, batch_idx) -> Tensor:
            return self.loss(batch)

    with pytest.raises(ValueError, match=r"Silent.validation_step logs nothing; .*self.log\('val_loss', loss\)"):
        both(Silent())
