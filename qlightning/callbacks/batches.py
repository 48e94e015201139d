"""Batches for a solver, in the middle of a run that must not notice that they were read."""

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

from lightning.pytorch import Trainer
from torch import Generator
from torch.utils.data import DataLoader, IterableDataset

from qlightning.data.loader import Loader
from qlightning.evaluation.random_state import random_state, restore_random_state


class CalibrationBatches:
    """Batches on the module's device: all of `datamodule.calibration_dataloader()`, or the first of the training data.

    Read once, and the same in every iteration. The training loader's position and order and every random number
    generator stay as they were.

    Args:
        trainer: The Trainer of the run.
        count: How many batches of the training data.

    Raises:
        ValueError: The training data cannot be read a second time beside the run.
    """

    def __init__(self, trainer: Trainer, count: int) -> None:
        self._trainer = trainer
        own = getattr(getattr(trainer, "datamodule", None), "calibration_dataloader", None)
        source = own() if own is not None else _second_pass(trainer.train_dataloader)
        self._batches = _read(source, None if own is not None else count)

    def __iter__(self) -> Iterator[Any]:
        trainer = self._trainer
        for batch in self._batches:
            batch = trainer.precision_plugin.convert_input(batch)
            batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def __len__(self) -> int:
        return len(self._batches)


def _read(loader: Any, count: int | None) -> list[Any]:
    before, generators = random_state(), _generators(loader)
    states = [generator.get_state() for generator in generators]
    try:
        return list(islice(loader, count))
    finally:
        restore_random_state(before)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _second_pass(loader: Any) -> Any:
    """Another reader of the same data, whose position is its own."""
    if isinstance(loader, Loader):
        order, taken = loader.order, loader.batch_sampler
        return Loader(
            loader.dataset,
            batch_size=taken.batch_size,
            drop_last=taken.drop_last,
            shuffle=order.shuffle,
            seed=order.seed,
            shard=order.shard,
            even=order.even,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
        )
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        again = copy.copy(loader)
        again._iterator = None  # with persistent workers it is the one that the run reads from
        return again
    raise ValueError(
        f"the training data, a {type(loader).__name__}, cannot be read a second time beside the run: give the "
        "LightningDataModule a method calibration_dataloader() that returns the batches for the solver"
    )


def _generators(loader: Any) -> list[Generator]:
    holders = (
        loader,
        getattr(loader, "sampler", None),
        getattr(getattr(loader, "batch_sampler", None), "sampler", None),
    )
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(generator): generator for generator in found if isinstance(generator, Generator)}.values())
