"""Triton: the Walsh-Hadamard transform in one pass, of which plain torch needs one per doubling, and with int8 codes.

Additions are those of `numerics.hadamard` in the same order, so that values and codes are its own bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlightning.numerics.hadamard import check_block, hadamard
from qlightning.numerics.kernels.fake_quant import (
    LARGEST_BLOCK,
    SHIPS,
    absmax,
    fake_quantize_slow,
    narrow,
    ship,
    smallest,
    snap,
)

_ELEMENTS = 4096  # of one program, where blocks are smaller


@triton.jit
def _butterfly(y, SIZE: tl.constexpr, LEVELS: tl.constexpr):
    """(SIZE,) in blocks of 2^LEVELS, not yet normalised."""
    for level in tl.static_range(LEVELS):
        pairs = tl.permute(tl.reshape(y, (SIZE // (2 << level), 2, 1 << level)), (0, 2, 1))
        first, second = tl.split(pairs)
        joined = tl.join(first + second, first - second)
        y = tl.reshape(tl.permute(joined, (0, 2, 1)), (SIZE,))
    return y


@triton.jit
def _rotate(x_ptr, y_ptr, count, norm, SIZE: tl.constexpr, LEVELS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0)
    y = _butterfly(x.to(tl.float32), SIZE, LEVELS) * norm
    tl.store(y_ptr + at, narrow(y, y_ptr.dtype.element_ty), mask=at < count)


@triton.jit
def _kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    low,
    high,
    bound,
    smallest,
    norm,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    LEVELS: tl.constexpr,
    SHIP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    mask = column < SIZE
    x = tl.load(x_ptr + row * SIZE + column, mask=mask, other=0.0)
    y = _butterfly(x.to(tl.float32), PADDED, LEVELS) * norm
    y = tl.reshape(narrow(y, x_ptr.dtype.element_ty).to(tl.float32), (1, PADDED))
    scale = ship(tl.div_rn(absmax(y), bound), smallest, SHIP)
    q = snap(tl.div_rn(y, scale), low, high)
    tl.store(codes_ptr + row * SIZE + column[None, :], tl.where(q == q, q, 0.0).to(tl.int8), mask=mask[None, :])
    tl.store(scale_ptr + row + tl.arange(0, 1)[:, None], scale)


def rotate(x: Tensor, block: int) -> Tensor:
    """The transform of neighbouring features; its twin is `numerics.hadamard.rotate_slow`.

    Args:
        x: (..., features), contiguous.
        block: Features that are mixed with each other, a power of two of at most 16384 that divides them.
    """
    y = torch.empty_like(x)
    if x.numel():  # blocks lie one behind the other, so that a program may take several, also of several rows
        size = max(block, _ELEMENTS)
        levels = block.bit_length() - 1
        _rotate[(triton.cdiv(x.numel(), size),)](x, y, x.numel(), block**-0.5, SIZE=size, LEVELS=levels)
    return y


def hadamard_quantize(
    x: Tensor, block: int, *, low: float, high: float, bound: float, ships_as: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """int8 codes of the rotated rows, and their scales.

    Args:
        x: (..., features), contiguous; at most 16384 features.
        block: Features that are mixed with each other, a power of two that divides them.
        low: Lowest code.
        high: Highest code.
        bound: The magnitude that one scale covers: scale = absmax / bound.
        ships_as: The dtype in which scales ship.

    Returns:
        int8 (..., features) and float32 (..., 1).
    """
    size = x.shape[-1]
    check_block(block, size)
    padded = triton.next_power_of_2(size)
    if padded > LARGEST_BLOCK:
        raise ValueError(f"rows of {size} features do not fit into one program: at most {LARGEST_BLOCK}")
    codes = torch.empty_like(x, dtype=torch.int8)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    _kernel[(scale.numel(),)](
        x, codes, scale, low, high, bound, smallest(ships_as), block**-0.5,
        SIZE=size, PADDED=padded, LEVELS=block.bit_length() - 1, SHIP=SHIPS[ships_as],
    )  # fmt: skip
    return codes, scale


def hadamard_quantize_slow(
    x: Tensor, block: int, *, low: float, high: float, bound: float, ships_as: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The twin of `hadamard_quantize`."""
    rotated = hadamard(x, block)
    scale, _, codes = fake_quantize_slow(rotated, None, low=low, high=high, bound=bound, ships_as=ships_as)
    return codes, scale
