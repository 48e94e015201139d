"""Statistics of blocks: the same bits in whatever order, on whatever device, between however many processes.

Extremes and order statistics are elements of the block. Sums are the exception in floating point, where every addition
rounds, so that devices and shards, which add in other orders, get other bits; here values are cut to multiples of one
power of two and added up as integers, which is exact. A `Pool` says which processes hold the rest of a block.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Pool(ABC):
    """Where the values of a block are. Its methods take what this process knows and return what all know together."""

    @abstractmethod
    def count(self, here: int) -> int:
        """Number of values."""

    @abstractmethod
    def maximum(self, x: Tensor) -> Tensor:
        """The elementwise maximum of float32; infinite instead of NaN where there are several processes."""

    @abstractmethod
    def total(self, x: Tensor) -> Tensor:
        """The elementwise sum of int64."""

    @abstractmethod
    def smallest(self, x: Tensor, rank: int) -> Tensor:
        """The rank-th smallest (from 1) along the last dimension of non-negative float32, (..., 1)."""


class Here(Pool):
    """All values are here."""

    def count(self, here: int) -> int:
        return here

    def maximum(self, x: Tensor) -> Tensor:
        return x

    def total(self, x: Tensor) -> Tensor:
        return x

    def smallest(self, x: Tensor, rank: int) -> Tensor:
        return x.kthvalue(rank, dim=-1, keepdim=True).values


HERE = Here()


def divide(x: Tensor, by: float) -> Tensor:
    """x / by in float32, the same bits on every device: CUDA multiplies by the reciprocal of a Python number.

    Compilers do so too, even where the number is a tensor. In float64 it does no harm: a quotient of two float32
    numbers is further from a tie between float32 numbers than float64 is wrong.
    """
    if torch.compiler.is_compiling():
        return (x.double() / by).float()
    return x / torch.full((), by, dtype=x.dtype, device=x.device)


def extremes(blocks: Tensor, pool: Pool = HERE) -> tuple[Tensor, Tensor]:
    """Smallest and largest value per block, float32 (..., 1), without a copy of the blocks where it would be large."""
    if not blocks.shape[-1]:  # a process without any rows
        lowest = torch.full((*blocks.shape[:-1], 1), torch.inf, device=blocks.device)
        highest = -lowest
    elif blocks.device.type == "cpu":  # torch's aminmax is not vectorized there, nor is amax in 16 bits
        blocks = blocks.float()
        lowest, highest = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    else:
        lowest, highest = torch.aminmax(blocks, dim=-1, keepdim=True)
    if pool is HERE:
        return lowest.float(), highest.float()
    ends = pool.maximum(torch.cat([-lowest.float(), highest.float()], -1))
    return -ends[..., :1], ends[..., 1:]


def absmax(blocks: Tensor, pool: Pool = HERE) -> Tensor:
    """Largest magnitude per block, float32 (..., 1)."""
    lowest, highest = extremes(blocks, pool)
    return torch.maximum(lowest.abs(), highest.abs())


def largest(x: Tensor, pool: Pool = HERE) -> Tensor:
    """The largest of all non-negative float32 values, 0-dim."""
    return pool.maximum(x.amax() if x.numel() else x.new_zeros(()))


def total_magnitude(x: Tensor, pool: Pool = HERE) -> Tensor:
    """Sum of |x| over the last dimension, float32 (..., 1).

    With 2^b above the number of values, each is cut to a multiple of 2^(b - 61) times the largest (or of 2^-126, where
    that is more), and these are added up exactly. Beside one rounding to float32 the error of the sum is therefore at
    most 2^(2 b - 61) of the largest magnitude, and that of the mean 2^(b - 61) of it.

    >>> total_magnitude(torch.tensor([[1.0] + [-(2.0**-26)] * 8])).item() == 1 + 2.0**-23
    True

    Args:
        x: (..., elements).
        pool: Where the rest of each block is.
    """
    top = absmax(x, pool).clamp(min=0)
    room = 62 - pool.count(x.shape[-1]).bit_length()
    units = (2.0 ** (room - 1) / _leading_power(top)).clamp(max=2.0**126)  # of which there are in 1
    added = pool.total(_added(x, units))
    return torch.where(top < torch.inf, added.float() / units, top)


def _added(x: Tensor, units: Tensor) -> Tensor:
    """Sums of the whole parts of |x| * units, int64 (..., 1); piece by piece, since eight bytes per value are many."""
    piece = 2**16 if x.device.type == "cpu" else 2**23
    if torch.compiler.is_compiling() or x.numel() <= piece:
        return (x.float() * units).abs_().to(torch.int64).sum(-1, keepdim=True)
    lines, each_units = x.reshape(-1, x.shape[-1]), units.reshape(-1, 1)
    if len(lines) == 1:
        parts = torch.cat([_added(part, each_units) for part in lines.split(piece, dim=1)], 1)
        return parts.sum(-1).reshape(units.shape)
    each = max(1, piece // x.shape[-1])
    pairs = zip(lines.split(each), each_units.split(each), strict=True)
    return torch.cat([_added(*pair) for pair in pairs]).view(units.shape)


def mean_magnitude(blocks: Tensor, pool: Pool = HERE) -> Tensor:
    """Mean of |x| per block, float32 (..., 1)."""
    return divide(total_magnitude(blocks, pool), pool.count(blocks.shape[-1]))


def _leading_power(x: Tensor) -> Tensor:
    """The largest power of two that is not larger, of non-negative values: 0 for 0 and subnormals, infinity for it."""
    integers, exponent = (torch.int32, 0x7F80_0000) if x.itemsize == 4 else (torch.int64, 0x7FF0_0000_0000_0000)
    return (x.view(integers) & exponent).view(x.dtype)
