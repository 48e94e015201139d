"""Batches whose order is a function of (seed, epoch), with a position that Lightning saves and restores.

Lightning continues its batch counter after a kill but starts the data again at the first batch, with another order.
`Loader` closes that gap: Lightning finds its `state_dict`, stores it with the loops, gives it back before the first
batch, and calls `set_epoch` at the start of each epoch.

What is exact after a resume, with any `num_workers`: which samples are in which batch, for every data set whose items
are a function of their index, or of (epoch, index) through `at_epoch`. An item that draws from the global random number
generator when it is read is not: the generator is restored after the batch was fetched. Reading a batch draws nothing
from the global generator.

Several processes: the loader takes its own share of the samples, Lightning finds no sampler to replace, and
`Trainer(use_distributed_sampler=...)` has no effect on it.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sized
from typing import Any, cast

import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler


def seeded(*key: int | str) -> torch.Generator:
    """A CPU generator whose seed is a hash of `key`: neighbouring seeds and epochs share nothing.

    >>> torch.equal(torch.rand(3, generator=seeded("order", 0, 1)), torch.rand(3, generator=seeded("order", 1, 0)))
    False
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


class Order(Sampler[int]):
    """The sample indices of one epoch for one process, a function of (seed, epoch, shard).

    >>> [list(Order(5, shard=(rank, 2))) for rank in range(2)]  # padded by the first sample: each rank has as many
    [[0, 2, 4], [1, 3, 0]]

    Args:
        length: Number of samples in the data set.
        shuffle: Draw a new order for each epoch; otherwise 0, 1, 2, ...
        seed: With the epoch it decides the order.
        shard: (rank, number of ranks). None: those of `torch.distributed` at the time of iteration.
        even: Repeat the first samples so that each rank has as many; otherwise the last ranks may have one less.
    """

    def __init__(
        self,
        length: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        shard: tuple[int, int] | None = None,
        even: bool = True,
    ) -> None:
        self.length, self.shuffle, self.seed, self.even = length, shuffle, seed, even
        self.epoch = 0
        self._shard = shard

    @property
    def shard(self) -> tuple[int, int]:
        """(rank, number of ranks)."""
        if self._shard is not None:
            return self._shard
        # Asked late: a loader is often built before Lightning has started the process group.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        rank, ranks = self.shard
        return math.ceil(self.length / ranks) if self.even else len(range(rank, self.length, ranks))

    def __iter__(self) -> Iterator[int]:
        rank, ranks = self.shard
        if self.shuffle:
            order = torch.randperm(self.length, generator=seeded("order", self.seed, self.epoch))
        else:
            order = torch.arange(self.length)
        if self.even:
            padded = math.ceil(self.length / ranks) * ranks
            order = order.repeat(math.ceil(padded / self.length))[:padded]
        return iter(order[rank::ranks].tolist())


class Loader:
    """Batches of a map-style data set in a reproducible order, resumable in mid-epoch.

    An iterable with a length for `Trainer.fit(model, Loader(...))` or a plain loop. A data set whose items change with
    the epoch (augmentation) has a method `at_epoch(epoch)` that returns the data set of that epoch. The position in the
    epoch is that of the last iteration that gave a batch: for a second pass beside the first take a second loader.

    >>> loader = Loader(range(6), batch_size=2)
    >>> [batch.tolist() for batch in loader]
    [[0, 1], [2, 3], [4, 5]]
    >>> first = next(iter(loader))
    >>> other = Loader(range(6), batch_size=2)
    >>> other.load_state_dict(loader.state_dict())
    >>> [batch.tolist() for batch in other]
    [[2, 3], [4, 5]]

    Args:
        dataset: Anything with `len(dataset)` and `dataset[index]`.
        batch_size: Samples in a batch, per process.
        shuffle: Draw a new order for each epoch.
        seed: With the epoch it decides the order.
        drop_last: Leave out the last batch of an epoch where it is smaller than `batch_size`.
        num_workers: Processes that read ahead; 0 reads in this process.
        shard: (rank, number of ranks). None: those of `torch.distributed` at the time of iteration.
        even: Repeat a few samples so that each rank has as many batches.
        collate_fn: Makes a batch of a list of samples. None: torch's default.

    Raises:
        ValueError: The data set is empty, or too small for one batch.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 0,
        shard: tuple[int, int] | None = None,
        even: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        length = len(cast(Sized, dataset))
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} gives no batches; write for example batch_size=8")
        if length == 0:
            raise ValueError("the data set is empty; a loader needs at least one sample")
        self.dataset, self.num_workers, self.collate_fn = dataset, num_workers, collate_fn
        self.order = Order(length, shuffle=shuffle, seed=seed, shard=shard, even=even)
        # Lightning looks for `set_epoch` on `batch_sampler.sampler`.
        self.batch_sampler = BatchSampler(self.order, batch_size, drop_last)
        if len(self) == 0 and even:
            raise ValueError(
                f"{len(self.order)} samples per process make no batch of {batch_size} with drop_last=True; "
                f"write batch_size={len(self.order)} or less, or Loader(..., drop_last=False)"
            )
        self._epoch = self._done = 0
        self._resuming = False

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing below runs before the first batch is asked for, and by then Lightning has set the epoch.
        epoch, start = self.order.epoch, self._start()
        dataset = self.dataset.at_epoch(epoch) if hasattr(self.dataset, "at_epoch") else self.dataset
        batches = DataLoader(
            dataset,
            batch_sampler=list(self.batch_sampler)[start:],  # type: ignore[arg-type]  # any iterable of index lists
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            # A new iterator draws the seed of its workers: from here, not from the global generator of the model.
            generator=seeded("workers", self.order.seed, epoch),
        )
        for done, batch in enumerate(batches, start + 1):
            # Counted before it is given out: a checkpoint written while the batch is in use has seen the batch.
            self._epoch, self._done = epoch, done
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position: epoch and samples given out in it by all processes together, and the order it refers to."""
        samples = self._done * self._stride()
        return {"epoch": self._epoch, "samples": samples, "seed": self.order.seed, "length": self.order.length}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration start where `state` stopped.

        Another batch size or number of processes is allowed: the position is rounded down to whole batches.

        Raises:
            ValueError: The state is of another order (seed or data set).
        """
        for name, here in (("seed", self.order.seed), ("length", self.order.length)):
            if state[name] != here:
                raise ValueError(
                    f"the checkpoint stopped inside an order of {state['length']} samples with seed={state['seed']}, "
                    f"this loader has {self.order.length} samples and seed={self.order.seed}: the {name} differs. "
                    f"Resume with the data and seed={state['seed']} of the checkpoint, or start a new run from its "
                    "weights: model.load_state_dict(torch.load(path)['state_dict']) and trainer.fit without ckpt_path"
                )
        self.order.set_epoch(state["epoch"])
        self._epoch, self._done = state["epoch"], state["samples"] // self._stride()
        self._resuming = True

    def _stride(self) -> int:
        return self.batch_sampler.batch_size * self.order.shard[1]

    def _start(self) -> int:
        """The batch to begin with; a restored position counts once, and only in the epoch it was taken in."""
        resuming, self._resuming = self._resuming, False
        return self._done if resuming and self._epoch == self.order.epoch else 0
