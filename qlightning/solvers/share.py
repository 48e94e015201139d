"""What one process has of the calibration data, and how it and the others come to one result.

Batches stay where they were read, with all that is captured of them. What travels is what solvers take from them: sums
over tokens, one number of a batch, the gradient of a step, an answer that was found on the first batch. The batches of
all processes have one order, and a result is that of one process on them in this order: numbers of batches are added in
it, random numbers follow it, and whatever is decided is decided on the same numbers everywhere.
"""

import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qlightning.capture import stored

T = TypeVar("T")


class Share:
    """The batches of this process among those of all. Without arguments: there is one process, and all are here.

    The first batch of every process comes first, in the order of processes, then the second of every process, and so
    on. Every method but `count` and `number` is called by all processes alike.

    Args:
        counts: Number of batches of each process.
        rank: Which of them this is.
        device: Where what travels lies.

    Attributes:
        alone: Whether there is no other process.
        counts: Number of batches of each.
    """

    def __init__(self, counts: Sequence[int] = (), rank: int = 0, *, device: torch.device | str = "cpu") -> None:
        self.alone, self.counts = len(counts) < 2, tuple(counts)
        self.rank, self.device = rank, torch.device(device)
        self._owners = [r for _, r in sorted((j, r) for r, count in enumerate(counts) for j in range(count))]
        self._own = [number for number, owner in enumerate(self._owners) if owner == rank]
        self._here = {number: index for index, number in enumerate(self._own)}
        self._first = self._owners[0] if self._owners else 0

    def count(self, here: int) -> int:
        """Number of batches of all processes, of which `here` are here."""
        return here if self.alone else len(self._owners)

    def number(self, index: int) -> int:
        """Which of all batches one is that is here."""
        return index if self.alone else self._own[index]

    # --- numbers and tensors ---

    def over(self, numbers: Iterable[int], measure: Callable[[int], float]) -> list[float]:
        """A number for each of some batches of all, in their order, each found where the batch is.

        Args:
            numbers: Of the batches.
            measure: Told which of the batches here, (index) -> number.
        """
        if self.alone:
            return [measure(number) for number in numbers]
        wanted = list(numbers)
        found = torch.zeros(len(wanted), dtype=torch.float64)
        for place, number in enumerate(wanted):
            if (index := self._here.get(number)) is not None:
                found[place] = measure(index)
        return self.sum(found).tolist()  # exact: all others are zero

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes in float64; the tensor may be changed in place."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def largest(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum over processes in float64; the tensor may be changed in place."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def _reduced(self, tensor: Tensor, op: Any) -> Tensor:
        if self.alone:
            return tensor
        message = tensor.detach().to(self.device, torch.float64).contiguous()
        dist.all_reduce(message, op)
        return message.to(tensor.device)

    def gradients(
        self, number: int, take: Callable[[int], Sequence[Tensor | None]], like: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The gradients of one batch of all, taken where it is.

        Learning takes one batch a step on any number of processes, and not one of each with the mean of their
        gradients: rates and numbers of steps are chosen for steps of one batch, and what is learned from the same
        data shall not depend on how many processes read it.

        Args:
            number: Of the batch.
            take: Told which of the batches here, (index) -> gradients.
            like: What they are the gradients of.
        """
        if self.alone:
            return list(take(number))
        wide = reduce(torch.promote_types, (tensor.dtype for tensor in like), torch.float32)
        sizes = [1 + tensor.numel() for tensor in like]
        message = torch.zeros(sum(sizes), dtype=wide, device=self.device)
        if (index := self._here.get(number)) is not None:
            for part, gradient in zip(message.split(sizes), take(index), strict=True):
                if gradient is not None:
                    part[0] = 1.0
                    part[1:] = gradient.detach().flatten()
        dist.broadcast(message, src=self._owners[number])
        return [
            part[1:].view(t.shape).to(t.device, t.dtype) if bool(part[0]) else None
            for part, t in zip(message.split(sizes), like, strict=True)
        ]

    @torch.no_grad()
    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Let all processes have the first one's, bit for bit, should other devices have rounded otherwise."""
        for tensor in tensors if not self.alone else ():
            message = tensor.detach().to(self.device, copy=True).contiguous()
            dist.broadcast(message.reshape(-1).view(torch.uint8), src=0)
            if not torch.equal(message.to(tensor.device), tensor):
                tensor.copy_(message)

    # --- answers ---

    def decide(self, ask: Callable[[], T], generator: torch.Generator | None = None) -> T:
        """The answer to what is asked of the first batch, of the process that has it.

        Args:
            ask: Returns plain data, or raises ValueError, which then all processes raise.
            generator: What it draws from; goes on alike in all processes.
        """
        if self.alone:
            return ask()
        said: list[Any] = [None, None, None]
        if self.rank == self._first:
            try:
                said[0] = ask()
            except ValueError as error:
                said[1] = str(error)
            said[2] = None if generator is None else generator.get_state()
        dist.broadcast_object_list(said, src=self._first, device=self.device)
        if said[1] is not None:
            raise ValueError(said[1])
        if generator is not None:
            generator.set_state(said[2])
        return said[0]  # type: ignore[no-any-return]

    def together(self, run: Callable[[], T]) -> T:
        """What each process finds itself; if one raises ValueError, all do, where they would wait for it forever."""
        if self.alone:
            return run()
        result, error = None, None
        try:
            result = run()
        except ValueError as raised:
            error = str(raised)
        for rank, wrong in enumerate(_from_all(error)):
            if wrong is not None:
                raise ValueError(f"process {rank}: {wrong}")
        return result  # type: ignore[return-value]


ALONE = Share()


def share_of(batches: Iterable[Any], count: int | None, device: torch.device) -> tuple[list[Any], Share]:
    """The batches of this process, and their place among those of all that `torch.distributed` knows of.

    Where every process reads batches of its own, as from a loader that shards, it takes its part of `count` from them.
    Where all read the same, each takes other ones.

    Args:
        batches: What this process reads.
        count: How many batches all processes take together; None for all that there are.
        device: Of the module.
    """
    data = list(islice(batches, count))
    if not several():
        return data, ALONE
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if len(set(_from_all(tuple(map(fingerprint, data))))) == 1:
        data = data[rank::ranks]
    elif count is not None:
        data = data[: len(range(rank, count, ranks))]
    return data, Share(_from_all(len(data)), rank, device=device)


def several() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def first_batch(data: Sequence[Any], share: Share) -> Any:
    """The first batch of all, for every process."""
    return data[0] if share.alone else share.decide(lambda: stored(data[0]))


def _from_all(mine: Any) -> list[Any]:
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    return said


def fingerprint(data: Any) -> int:
    """A checksum of all tensors in the data."""
    total = 0
    for leaf in tree_leaves(data):
        if isinstance(leaf, Tensor):
            raw = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            total = zlib.crc32(raw.numpy().tobytes(), total)
    return total
