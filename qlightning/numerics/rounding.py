"""Roundings: which neighbour a value between two representable ones becomes."""

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qlightning.numerics.part import Part


class Rounding(Part, nn.Module, ABC):
    """Maps positions on an integer lattice to integers.

    Rounding is replayed when backward recomputes the forward pass, so its randomness must be a function of a key: take
    one `key()` per forward call and pass it to every replay.

    Attributes:
        ties: To which neighbour a deployed value goes that lies in the middle: the "even" one or "up".
    """

    ties: str = "even"

    def __init__(self) -> None:
        nn.Module.__init__(self)

    __repr__ = Part.__repr__
    __eq__ = Part.__eq__
    __hash__ = nn.Module.__hash__

    @abstractmethod
    def key(self) -> Tensor | None:
        """What this forward call's randomness is a function of: an int64 tensor of one element, or None."""

    @abstractmethod
    def round(self, position: Tensor, key: Tensor | None) -> Tensor:
        """Integers (float32, same shape), deterministic given `key`. It may overwrite `position`."""


class Nearest(Rounding):
    """To the nearest integer, ties to even."""

    def key(self) -> Tensor | None:
        return None

    def round(self, position: Tensor, key: Tensor | None) -> Tensor:
        return position.round_()


class HalfUp(Rounding):
    """To the nearest integer, ties towards positive infinity, as MS-AMP's FP4 kernel rounds.

    >>> HalfUp().round(torch.tensor([-1.5, -0.5, 0.5, 1.4]), None)
    tensor([-1.,  0.,  1.,  1.])
    """

    ties = "up"

    def key(self) -> Tensor | None:
        return None

    def round(self, position: Tensor, key: Tensor | None) -> Tensor:
        below = torch.floor(position)
        return below + (position - below >= 0.5)  # position + 0.5 would be rounded before it is floored


class Random(Rounding, ABC):
    """A rounding with random numbers of its own; nearest in eval mode.

    They come from a counter-based generator: a hash of (seed, step, element index), equal on every device, independent
    of the global generator, and replayed exactly by recomputation and by a resumed run (`step` travels in the
    checkpoint). `advance` moves to the next step's numbers; QATCallback calls it once per batch.

    Attributes:
        local: Whether each process draws numbers of its own, as for activations, which are other values in each. The
            processes of a run round one weight alike.

    Args:
        seed: Stream of random numbers; give layers different seeds for independent noise.
    """

    local: bool = False
    step: Tensor

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64))

    def advance(self) -> None:
        """Move to the random numbers of the next batch."""
        self.step += 1

    def key(self) -> Tensor | None:
        if not self.training:
            return None
        key = _mix(_mix(self.step + self.seed * 0x9E3779B1) + 0x85EBCA6B)
        return fold(key, process()) if self.local else key


class Stochastic(Random):
    """Up with probability equal to the fraction, so that the expectation is the input. Nearest in eval mode."""

    def round(self, position: Tensor, key: Tensor | None) -> Tensor:
        if key is None:
            return position.round_()
        below = torch.floor(position)
        return below + (position - below > uniform(position, key))


def fold(key: Tensor | None, number: int) -> Tensor | None:
    """A key of its own for each number (a process, say); that of 0 is the key itself."""
    return key if key is None or not number else _mix(key + number * 0x9E3779B1)


def process() -> int:
    """The number of this process, 0 where there is but one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def processes() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


_WORD = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A bijective hash of the low 32 bits, in int64 so that it is the same everywhere; overwrites x."""
    x.bitwise_and_(_WORD)
    x.bitwise_xor_(x >> 16).mul_(0x7FEB352D).bitwise_and_(_WORD)
    x.bitwise_xor_(x >> 15).mul_(0x846CA68B).bitwise_and_(_WORD)
    return x.bitwise_xor_(x >> 16)


def uniform(like: Tensor, key: Tensor) -> Tensor:
    """Uniform float32 in [0, 1 - 2^-24], one per element of `like`."""
    index = torch.arange(like.numel(), device=like.device)
    bits = _mix(_mix(index).add_(key)).bitwise_right_shift_(8)
    return bits.to(torch.float32).mul_(2.0**-24).view(like.shape)
