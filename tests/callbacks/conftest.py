"""A small model, its data and a quiet Trainer for the tests of the callbacks.

Everything is on one CPU process and a function of its seeds, so that runs can be compared bit for bit.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from qlightning.data.loader import Loader
from qlightning.layers.convert import quantizers_of


def make_layers(*, dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    """(N, 8) -> (N, 4). The layers are called 0, 2 and 4 inside whatever holds them."""
    generator = torch.Generator().manual_seed(seed)
    layers = nn.Sequential(
        nn.Linear(8, 16), nn.Dropout(dropout), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4, bias=False)
    )
    for parameter in layers.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return layers


class Net(LightningModule):
    """Regression with Adam. Subclasses build the layers elsewhere or optimize otherwise."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.net = make_layers(dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self(x).float() - y.float()).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)


class SetupNet(Net):
    """Its layers do not exist before `LightningModule.setup`."""

    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.net = None

    def setup(self, stage: str) -> None:
        if self.net is None:
            self.net = make_layers()


class LazyNet(Net):
    """Its layers do not exist before `configure_model`."""

    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = make_layers()


class EarlyNet(Net):
    """Complete in `__init__`, with a `configure_model` that finds nothing left to do."""

    def configure_model(self) -> None:
        assert self.net is not None


class Record(Callback):
    """Keeps the loss of every batch with its step, and whatever `look` says at its start."""

    def __init__(self, look: Any = None) -> None:
        self.look = look
        self.losses: list[tuple[int, float]] = []
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.look is not None:
            self.seen.append(self.look(trainer, pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append((trainer.global_step, float(outputs["loss"])))


class Kit:
    """What the tests build their runs from."""

    Net, SetupNet, LazyNet, EarlyNet, Record, Loader = Net, SetupNet, LazyNet, EarlyNet, Record, Loader
    make_layers = staticmethod(make_layers)

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def rows(count: int = 24, *, seed: int = 7) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 8, generator=generator)
        return TensorDataset(x, torch.stack([x[:, :4].sum(1), x[:, 0] * x[:, 1], x[:, 2].abs(), x[:, 3]], 1))

    def loader(self, **options: Any) -> Loader:
        """Six batches of four per epoch, shuffled."""
        return Loader(self.rows(), **{"batch_size": 4, "shuffle": True, "seed": 3, **options})

    def held_out(self) -> Loader:
        return Loader(self.rows(10, seed=8), batch_size=4)

    def trainer(self, *callbacks: Callback, **options: Any) -> Trainer:
        return Trainer(
            callbacks=list(callbacks),
            **{
                "accelerator": "cpu",
                "max_steps": 8,
                "logger": False,
                "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "default_root_dir": self.folder,
                **options,
            },
        )

    def fit(self, module: LightningModule, *callbacks: Callback, ckpt_path: Any = None, **options: Any) -> Trainer:
        trainer = self.trainer(*callbacks, **options)
        trainer.fit(module, self.loader(), self.held_out(), ckpt_path=ckpt_path)
        return trainer

    @staticmethod
    def every_step(folder: Path, *, keep: int = -1) -> ModelCheckpoint:
        """Writes `step=<k>.ckpt` after each optimizer step; with keep=0 it is the same callback, and writes nothing."""
        return ModelCheckpoint(
            folder,
            filename="{step}",
            every_n_train_steps=1,
            save_top_k=keep,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    @staticmethod
    def scales(module: nn.Module) -> dict[str, Tensor]:
        """Copies of all learned scales by name."""
        return {
            f"{name}.{key}": value.detach().clone()
            for name, quantizer in quantizers_of(module)
            for key, value in quantizer.named_parameters()
        }

    @torch.no_grad()
    def outputs(self, module: nn.Module) -> Tensor:
        """What the module says to held-out rows, in eval mode."""
        modes = {child: child.training for child in module.modules()}
        module.eval()
        y = module(self.rows(10, seed=8).tensors[0])
        for child, mode in modes.items():
            child.training = mode
        return y


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A resumed run goes on in the folder of the interrupted one, which ModelCheckpoint warns of."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"))


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path)
