"""A killed run and an uninterrupted one give the same losses, bit for bit, through Lightning's Trainer.

The checkpoints are ModelCheckpoint's. `trainer.save_checkpoint` after a `fit` that max_steps ended is another thing:
Lightning has counted the epoch as done by then.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qlightning.data import Digits, Loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]

Losses = list[tuple[int, int, float]]


class Net(L.LightningModule):
    """Dropout makes the losses depend on the random numbers, AdamW on the whole history."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(width, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch["image"].flatten(1) if isinstance(batch, dict) else batch[0]
        return self.net(x).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class RandomState(Callback):
    """The two things that the loader cannot do, as a training callback has to do them.

    The generator is restored after the first batch was fetched. And Lightning, resumed from the end of an epoch, counts
    the next epoch as not begun: a second resume out of that epoch would go astray.
    """

    saved: Tensor | None = None

    def state_dict(self) -> dict[str, Tensor]:
        return {"cpu": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self.saved = state_dict["cpu"]

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self.saved is not None:
            torch.set_rng_state(self.saved)
            self.saved = None
        progress = trainer.fit_loop.epoch_progress
        if progress.current.ready == progress.current.processed:
            progress.increment_ready()
            progress.increment_started()


class Killed(Exception):
    pass


class Record(Callback):
    """Keeps (epoch, batch index, loss) of each step, and stops like a kill would."""

    def __init__(self, kill_at: int | None) -> None:
        self.seen: Losses = []
        self.kill_at = kill_at

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.kill_at:
            raise Killed

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((trainer.current_epoch, batch_idx, float(outputs["loss"])))


def fit(
    folder: Path,
    data: Any,
    *,
    resume: Path | None = None,
    kill_at: int | None = None,
    width: int = 5,
    **settings: Any,
) -> Losses:
    """One process's fit, as far as the random state goes; every step is saved."""
    torch.manual_seed(1 if resume is None else 2)
    record = Record(kill_at)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[
            RandomState(),
            record,
            ModelCheckpoint(
                folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False
            ),
        ],
        **{"max_steps": 11, **settings},
    )
    loaders = {"datamodule": data} if isinstance(data, L.LightningDataModule) else {"train_dataloaders": data}
    if not isinstance(data, L.LightningDataModule):
        loaders["val_dataloaders"] = Loader(rows(), batch_size=10)
    with suppress(Killed):
        trainer.fit(Net(width), **loaders, ckpt_path=resume)
    return record.seen


def rows() -> TensorDataset:
    return TensorDataset(torch.randn(22, 5, generator=torch.Generator().manual_seed(0)))


def loader(**options: Any) -> Loader:
    return Loader(rows(), **{"batch_size": 5, "shuffle": True, "seed": 3, **options})


def check_each_step(folder: Path, data: Callable[[], Any], **options: Any) -> None:
    whole = fit(folder / "whole", data(), **options)
    saved = list((folder / "whole").iterdir())
    accumulated = options.get("accumulate_grad_batches", 1)
    assert len(saved) == -(-len(whole) // accumulated)
    for checkpoint in saved:
        resumed = fit(folder / "whole", data(), resume=checkpoint, **options)
        assert resumed == whole[len(whole) - len(resumed) :], checkpoint
        state = torch.load(checkpoint)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        assert len(resumed) == len(whole) - state, checkpoint


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_steps": -1, "max_epochs": 3},
        {"max_steps": -1, "max_epochs": 3, "limit_train_batches": 3},
        {"limit_train_batches": 3},
        {"val_check_interval": 2},
    ],
    ids=str,
)
def test_from_each_step(tmp_path, settings):
    check_each_step(tmp_path, loader, **settings)


def test_from_each_step_with_workers(tmp_path):
    check_each_step(tmp_path, lambda: loader(num_workers=1), max_steps=7)


def test_mirrored_pictures_from_each_step(tmp_path):
    check_each_step(
        tmp_path,
        lambda: Digits(batch_size=16, max_images=60, flip=0.5, seed=1),
        width=64,
        max_steps=5,
        limit_val_batches=1,
    )


@pytest.mark.parametrize("settings", [{}, {"max_steps": -1, "max_epochs": 3}, {"limit_train_batches": 3}], ids=str)
def test_killed_again_and_again(tmp_path, settings):
    whole = fit(tmp_path / "whole", loader(), **settings)
    seen = fit(tmp_path / "run", loader(), kill_at=3, **settings)
    # An epoch ends at step 5, or 3 with limit_train_batches: from there Lightning's counters need the repair above.
    for start, kill in ((3, 4), (4, 5), (5, 8), (8, 9), (9, 10), (10, None)):
        assert seen == whole[:start]
        seen += fit(tmp_path / "run", loader(), resume=tmp_path / f"run/step={start}.ckpt", kill_at=kill, **settings)
    assert seen == whole


def test_a_plain_loader_is_not_exact(tmp_path):
    """The reason for `Loader`, and the proof that these tests can fail."""

    def plain() -> DataLoader:
        return DataLoader(rows(), batch_size=5, shuffle=True, num_workers=1)

    whole = fit(tmp_path, plain(), max_steps=6)
    with pytest.warns(PossibleUserWarning, match="not resumable"):
        resumed = fit(tmp_path, plain(), resume=tmp_path / "step=2.ckpt", max_steps=6)
    assert [place[:2] for place in resumed] == [place[:2] for place in whole[2:]]
    assert resumed != whole[2:]


def test_overfit_batches_repeat_the_same_batches(tmp_path):
    data = Digits(batch_size=16, max_images=60, seed=1)
    fit(tmp_path, data, width=64, max_steps=-1, max_epochs=2, overfit_batches=2, limit_val_batches=1)
    train = data.trainer.train_dataloader
    epochs = []
    for epoch in range(2):
        train.order.set_epoch(epoch)
        epochs.append(torch.cat([batch["label"] for batch in train]))
    assert torch.equal(*epochs)


class Shares(Callback):
    """Writes what each rank was given, as files: the ranks are processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        name = f"{trainer.global_rank}-{trainer.current_epoch}-{batch_idx}.pt"
        torch.save(batch[0], self.folder / name)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its ranks by fork")
def test_two_ranks_share_the_samples_and_resume(tmp_path):
    def run(name: str, resume: Path | None = None) -> dict[str, Tensor]:
        (tmp_path / name).mkdir()
        save = ModelCheckpoint(
            tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False
        )
        trainer = L.Trainer(
            accelerator="cpu",
            strategy="ddp_fork",
            devices=2,
            max_epochs=2,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[Shares(tmp_path / name), save],
        )
        trainer.fit(Net(5), loader(batch_size=4), Loader(rows(), batch_size=4), ckpt_path=resume)
        return {file.stem: torch.load(file) for file in (tmp_path / name).iterdir()}

    whole = run("whole")
    data = rows().tensors[0]
    for epoch in range(2):
        for rank in range(2):
            share = loader(batch_size=4, shard=(rank, 2))
            share.order.set_epoch(epoch)
            for i, indices in enumerate(share.batch_sampler):
                assert torch.equal(whole[f"{rank}-{epoch}-{i}"], data[indices])
        seen = torch.cat([batch for name, batch in whole.items() if f"-{epoch}-" in name])
        assert len(seen) == len(seen.unique(dim=0)) == 22
    resumed = run("resumed", tmp_path / "step=2.ckpt")
    assert resumed.keys() == whole.keys() - {"0-0-0", "0-0-1", "1-0-0", "1-0-1"}
    assert all(torch.equal(batch, whole[name]) for name, batch in resumed.items())
