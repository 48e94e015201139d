"""What every DataModule of this package shares: three named splits, read once, and four loaders over them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import Dataset

from qlightning.data.loader import Loader, seeded

TRAIN, VALIDATION, TEST = "train", "validation", "test"

_READ_AT = {"fit": (TRAIN, VALIDATION), "validate": (VALIDATION,), "test": (TEST,), "predict": (TEST,), None: ()}


def hold_out(length: int, fraction: float, parts: Sequence[str]) -> dict[str, list[int]]:
    """Shares the indices 0 to `length` - 1 between "train" and the held-out `parts`, by a fixed random draw.

    The draw depends on `length` alone, not on the seed of a run: two runs compare on the same held-out samples.

    >>> shares = hold_out(10, 0.2, ["validation", "test"])
    >>> {part: len(indices) for part, indices in shares.items()}
    {'validation': 2, 'test': 2, 'train': 6}

    Args:
        length: Number of samples.
        fraction: Share of each held-out part, at least one sample.
        parts: Names of the held-out parts.

    Raises:
        ValueError: Nothing would be left to train on.
    """
    order = torch.randperm(length, generator=seeded("hold out", length)).tolist()
    size = max(1, round(fraction * length))
    if not 0 < fraction < 1 or size * len(parts) >= length:
        raise ValueError(
            f"held_out={fraction} of {length} samples for each of {', '.join(parts)} leaves nothing to train on; "
            "write a smaller share, for example held_out=0.05, or name a file for each split with data_files={...}"
        )
    shares = {part: sorted(order[i * size : (i + 1) * size]) for i, part in enumerate(parts)}
    return {**shares, TRAIN: sorted(order[len(parts) * size :])}


class SplitData(LightningDataModule, ABC):
    """A LightningDataModule over the splits "train", "validation" and "test"; predict reads "test".

    A subclass says how one split is read. Each is read once, when a stage first needs it.

    Args:
        batch_size: Samples in a batch, per process.
        seed: With the epoch it decides the order of the training samples.
        num_workers: Processes that read ahead. The data sets here lie in memory, where 0 is the fastest.
    """

    def __init__(self, *, batch_size: int, seed: int, num_workers: int) -> None:
        super().__init__()
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self._datasets: dict[str, Dataset[Any]] = {}

    @abstractmethod
    def read(self, split: str) -> Dataset[Any]:
        """The samples of one split; a ValueError where there are none."""

    def dataset(self, split: str) -> Dataset[Any]:
        """The samples of one split, read at the first call."""
        if split not in self._datasets:
            self._datasets[split] = self.read(split)
        return self._datasets[split]

    def setup(self, stage: str | None = None) -> None:
        """Reads the splits of a stage ("fit", "validate", "test", "predict"); with None each waits for its loader."""
        for split in _READ_AT[stage]:
            self.dataset(split)

    def train_dataloader(self) -> Loader:
        """Shuffled anew in each epoch, whole batches only."""
        # Trainer(overfit_batches=...) asks for the same batches in each epoch.
        overfit = self.trainer is not None and getattr(self.trainer, "overfit_batches", 0) > 0
        return self._loader(TRAIN, shuffle=not overfit, drop_last=True)

    def val_dataloader(self) -> Loader:
        """The validation split in order."""
        return self._loader(VALIDATION)

    def test_dataloader(self) -> Loader:
        """The test split in order."""
        return self._loader(TEST)

    def predict_dataloader(self) -> Loader:
        """The test split in order, each sample once also over several processes."""
        return self._loader(TEST, even=False)

    def _loader(self, split: str, *, shuffle: bool = False, drop_last: bool = False, even: bool = True) -> Loader:
        # Lightning's answer and not torch.distributed's: under tensor parallelism several ranks read the same samples.
        share = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return Loader(
            self.dataset(split),
            batch_size=self.batch_size,
            seed=self.seed,
            num_workers=self.num_workers,
            shard=(share["rank"], share["num_replicas"]) if share else None,
            shuffle=shuffle,
            drop_last=drop_last,
            even=even,
        )
