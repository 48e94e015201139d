"""Models, checkpoints and reports for the tests of reporting. Nothing is trained where nothing need be."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from qlightning.data.loader import Loader
from qlightning.layers.convert import convert
from qlightning.reporting.drawing import draw
from qlightning.reporting.figures import Picture
from qlightning.reporting.logs import Logs
from qlightning.reporting.report import Report, report_on
from qlightning.reporting.run import Run, run_of


class Net(LightningModule):
    """(N, 32) -> (N, 4), with an embedding and a norm that stay in float by default."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, width, bias=False), nn.LayerNorm(width))
        self.table = nn.Embedding(16, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x) + self.table.weight.mean(0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self(batch[0]).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({"val_loss": self(batch[0]).square().mean(), "val_size": self(batch[0]).abs().mean()})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Kit:
    """What the tests report on."""

    Net = Net

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def net(rules: Any = "int4-g32", **options: Any) -> Net:
        module = Net()
        convert(module, rules, min_coverage=0.0, **options)
        return module.eval()

    @staticmethod
    def run(module: nn.Module, **changes: Any) -> Run:
        """A run of which nothing was written down, but for what `changes` say."""
        return run_of({"global_step": 7}, module, title="Net", folders=[])._replace(**changes)

    def report(self, rules: Any = "int4-g32", **changes: Any) -> Report:
        module = self.net(rules) if not isinstance(rules, nn.Module) else rules
        return report_on(module, self.run(module, **changes))

    @staticmethod
    def logs(**curves: Any) -> Logs:
        return Logs(dict(curves), [], [])

    @property
    def out(self) -> Path:
        return self.folder / "report"

    @staticmethod
    def rows() -> Loader:
        return Loader(TensorDataset(torch.randn(16, 32, generator=torch.Generator().manual_seed(3))), batch_size=4)

    def fit(self, module: LightningModule, *callbacks: Any, **options: Any) -> Trainer:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
        defaults = {"accelerator": "cpu", "logger": False, "max_steps": 8, "default_root_dir": self.folder}
        options = {**quiet, **defaults, "enable_checkpointing": False, **options}
        trainer = Trainer(callbacks=list(callbacks), **options)
        trainer.fit(module, self.rows(), self.rows())
        return trainer


class Drawn(NamedTuple):
    """A report with its pictures, drawn once for all tests."""

    report: Report
    pictures: dict[str, Picture]


@pytest.fixture(scope="session")
def large() -> Drawn:
    """A model of 120 linear layers, int4 and int8 in turns."""
    pairs = (nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(60))
    module = nn.ModuleDict({"layers": nn.ModuleList(pairs)})
    convert(module, {"*": "int8", "*.up": "int4"})
    report = report_on(module.eval(), Kit.run(module))
    return Drawn(report, {picture.name: picture for picture in draw(report)})


@pytest.fixture(scope="session")
def small() -> Drawn:
    """A model with names of a stranger, and its losses."""
    module = nn.ModuleDict({"$x_{<b>$": nn.Linear(8, 8), "y": nn.Linear(8, 4, bias=False)})
    convert(module, {"*": "int8", "y": "int3"})
    report = report_on(module.eval(), Kit.run(module, logs=Kit.logs(val_loss=[(0, 1.0), (1, 2.0)])))
    return Drawn(report, {picture.name: picture for picture in draw(report)})


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path)
