"""Victims: processes that are killed at some moment of what they do, and what is left behind is looked at.

A victim is a fork of the test's process, which has imported everything: a trial costs what its work costs.
"""

import os
import random
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from qlightning import QATCallback
from qlightning.data.loader import Loader

SAVED_EVERY, STEPS = 3, 14


class Victim:
    """A process that runs a function and may be killed."""

    def __init__(self, act: Callable[[], Any], folder: Path) -> None:
        self._story = folder / f"victim-{time.monotonic_ns()}.txt"
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                with open(self._story, "w") as said:
                    os.dup2(said.fileno(), 1)
                    os.dup2(said.fileno(), 2)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        act()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                self._story.write_text(traceback.format_exc())
            finally:
                os._exit(code)

    def kill_when(self, due: Callable[[], bool], *, limit: float = 60.0) -> bool:
        """Wait until `due` and kill it. Returns whether it was still at work."""
        deadline = time.monotonic() + limit
        while not self._ended(os.WNOHANG):
            if due() or time.monotonic() > deadline:
                os.kill(self._pid, signal.SIGKILL)
                self._ended(0)
                return True
            time.sleep(0.0005)
        return False

    def finish(self) -> None:
        assert not self.kill_when(lambda: False), f"took too long\n{self._story.read_text()}"

    def _ended(self, how: int) -> bool:
        pid, status = os.waitpid(self._pid, how)
        if pid and os.WIFEXITED(status) and os.WEXITSTATUS(status):
            pytest.fail(self._story.read_text(), pytrace=False)
        return bool(pid)


class Moments:
    """Random moments at which victims die: after a while, or while a file is written.

    Args:
        seed: Of the moments.
        whole: How long the undisturbed work took, in seconds.
        folder: Where they write.
    """

    def __init__(self, seed: int, whole: float, folder: Path) -> None:
        self._chance, self._whole, self._folder = random.Random(seed), whole, folder

    def next(self) -> Callable[[], bool]:
        after = time.monotonic() + self._chance.uniform(0, 1.1 * self._whole)
        if self._chance.random() < 0.5:
            return lambda: time.monotonic() > after
        # as soon as a file is begun or grows, from a random moment on, or at last when it should be done
        late, from_then = after + self._whole, time.monotonic() + self._chance.uniform(0, self._whole)
        seen: list[dict[str, int]] = []

        def writing() -> bool:
            now = time.monotonic()
            if now > from_then:
                seen.append(_sizes(self._folder))
            return now > late or any(before != after for before, after in pairwise(seen[-2:]))

        return writing


def kills(act: Callable[[], Any], folder: Path, moments: Moments, *, most: int = 4) -> Iterator[int]:
    """Let victims act and be killed until one is done; yields after each kill. At last one is left in peace."""
    for kill in range(most):
        if not Victim(act, folder).kill_when(moments.next()):
            return
        yield kill
    Victim(act, folder).finish()


def _sizes(folder: Path) -> dict[str, int]:
    sizes = {}
    for path in folder.glob("**/*"):
        with suppress(FileNotFoundError):  # renamed meanwhile
            sizes[str(path)] = path.stat().st_size
    return sizes


class Net(LightningModule):
    """Small regression, with dropout, so that random numbers matter. Some weight, so that a save takes a moment."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(2, 8)
        layers = nn.Linear(8, width), nn.Dropout(0.3), nn.ReLU(), nn.Linear(width, 64), nn.Linear(64, 4)
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return (self(x) - y).square().mean()

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.7), "interval": "step"}]


class Write(Callback):
    """Appends each step's loss to a file, bit for bit."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *args: Any) -> None:
        line = f"{os.getpid()} {trainer.global_step} {float(outputs['loss']).hex()}\n"
        with open(self.path, "a") as file:
            file.write(line)


def rows() -> Loader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, generator=generator)
    y = torch.stack([x.sum(1), x[:, 0] * x[:, 1], x[:, 2].abs(), x[:, 3]], 1)
    return Loader(TensorDataset(x, y), batch_size=8, shuffle=True, seed=3)


def trainer(folder: Path, *callbacks: Callback, steps: int = STEPS) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )


def train(folder: Path, *callbacks: Callback, steps: int = STEPS, width: int = 32) -> Net:
    """A run, or the rest of it: the same call every time, as a user's scheduler makes it again after a kill."""
    torch.manual_seed(1)
    module = Net(width)
    saves = ModelCheckpoint(
        folder / "checkpoints",
        save_last=True,
        save_top_k=0,
        every_n_train_steps=SAVED_EVERY,
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )
    qat = QATCallback("int4-lsq", "int8-tensor-lsq", start=5, calibration=2)
    kept = trainer(folder, qat, *callbacks, Write(folder / "losses.txt"), saves, steps=steps)
    kept.fit(module, rows(), ckpt_path="last")
    torch.save(module.state_dict(), folder / "end.pt")
    return module


def losses(folder: Path) -> list[tuple[str, int, str]]:
    """(process, step, loss) of every whole line."""
    path = folder / "losses.txt"
    text = path.read_text() if path.exists() else ""
    rows = [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]
    return [(process, int(step), loss) for process, step, loss in rows]


class Kit:
    """What the tests of this folder are made of."""

    SAVED_EVERY, STEPS = SAVED_EVERY, STEPS
    Victim, Moments, Net = Victim, Moments, Net
    train, trainer, rows, losses, kills = map(staticmethod, (train, trainer, rows, losses, kills))


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()
