"""Batches for a solver, and a run that does not notice that they were read."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from qlightning.callbacks.batches import CalibrationBatches
from qlightning.evaluation.random_state import random_state


class Read(Callback):
    """Reads calibration batches in the middle of the run."""

    def __init__(self, at, count=2) -> None:
        self.at, self.count, self.batches = at, count, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step in self.at and not self.batches:
            before = random_state()
            reader = CalibrationBatches(trainer, self.count)
            self.batches = [x for x, _ in reader]
            assert all(torch.equal(a, b[0]) for a, b in zip(self.batches, reader, strict=True))
            now = random_state()
            assert torch.equal(now["torch"], before["torch"])
            assert now["python"] == before["python"]
            assert torch.equal(now["numpy"][1], before["numpy"][1])


def loaders(kit):
    rows = kit.rows()
    own = torch.Generator().manual_seed(5)
    return {
        "loader": lambda: kit.loader(),
        "torch": lambda: DataLoader(rows, batch_size=4, shuffle=True),
        "generator": lambda: DataLoader(rows, batch_size=4, shuffle=True, generator=own.manual_seed(5)),
        "workers": lambda: DataLoader(rows, batch_size=4, shuffle=True, num_workers=1, persistent_workers=True),
    }


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*fork")
@pytest.mark.parametrize("kind", ["loader", "torch", "generator", "workers"])
def test_the_run_goes_on_as_if_nothing_had_been_read(kit, kind):
    losses = []
    for callbacks in ([], [Read(at=(3, 8))]):
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        record = kit.Record()
        kit.trainer(record, *callbacks, max_steps=14).fit(kit.Net(dropout=0.3), loaders(kit)[kind](), kit.held_out())
        losses.append(record.losses)
    assert losses[0] == losses[1]
    (read,) = callbacks
    assert [x.shape for x in read.batches] == [(4, 8)] * 2
    known = {tuple(row.tolist()) for row in kit.rows().tensors[0]}
    assert all(tuple(row.tolist()) in known for x in read.batches for row in x)


def test_the_position_of_a_resumable_loader_is_its_own(kit):
    loader, read = kit.loader(), Read(at=(3,), count=5)
    trainer = kit.trainer(read, max_steps=4)
    trainer.fit(kit.Net(), loader, kit.held_out())
    assert loader.state_dict()["samples"] == 4 * 4
    assert len(read.batches) == 5


def test_a_datamodule_says_what_it_is_calibrated_on(kit):
    class Data(LightningDataModule):
        def train_dataloader(self):
            return kit.loader()

        def val_dataloader(self):
            return kit.held_out()

        def calibration_dataloader(self):
            return DataLoader(kit.rows(9, seed=11), batch_size=3)

    read = Read(at=(2,), count=1)
    kit.trainer(read, max_steps=3).fit(kit.Net(), datamodule=Data())
    assert torch.equal(torch.cat(read.batches), kit.rows(9, seed=11).tensors[0])  # all of it, whatever the count


def test_batches_go_the_way_of_training_batches(kit):
    class Doubled(kit.Net):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return 2 * batch[0], batch[1]

    read = Read(at=(1,), count=1)
    kit.trainer(read, max_steps=2).fit(Doubled(), kit.loader(shuffle=False), kit.held_out())
    assert torch.equal(read.batches[0], 2 * kit.rows().tensors[0][:4])


class Stream(IterableDataset):
    def __iter__(self):
        yield from torch.zeros(8, 3)


@pytest.mark.parametrize("source", [DataLoader(Stream()), iter([]), [[1], [2]]], ids=["stream", "iterator", "several"])
def test_what_cannot_be_read_twice(source):
    trainer = SimpleNamespace(train_dataloader=source, datamodule=None)
    with pytest.raises(ValueError, match=r"cannot be read a second time .*calibration_dataloader\(\)"):
        CalibrationBatches(trainer, 2)
