"""Triton: absmax scales of columns, and the codes of a matrix transposed.

The tensor cores multiply 8-bit codes along contiguous rows, and a weight's gradient adds over tokens: both operands are
wanted with tokens last. Compiled as a reduction and a transposed copy they are read without order; here blocks are
turned inside the chip. The twin is the quantizer's own arithmetic on `x.t()`, and equal bit for bit.

Legend: x (M, N), contiguous; codes (N, M); scale (N, 1).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlightning.numerics.kernels.fake_quant import SHIPS, positions, ship, smallest, snap

_ROWS, _COLUMNS, _PASSES = 64, 128, 8


@triton.jit
def _largest(x_ptr, bits_ptr, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PASSES: tl.constexpr):
    """Largest magnitudes as the bits of float32, which are in the order of the numbers, with NaN above all."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    largest = tl.zeros((ROWS, COLUMNS), tl.int32)
    for step in range(PASSES):
        row = ((tl.program_id(0) * PASSES + step) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
        x = tl.load(x_ptr + row * N + column, mask=(row < M) & (column < N), other=0.0).to(tl.float32)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tl.atomic_max(bits_ptr + at, tl.max(largest, axis=0), mask=at < N)


@triton.jit
def _transposed(
    x_ptr, bits_ptr, codes_ptr, scale_ptr, M, N, low, high, bound, least,
    SHIP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    low, high, bound = tl.cast(low, tl.float32), tl.cast(high, tl.float32), tl.cast(bound, tl.float32)
    least = tl.cast(least, tl.float32)  # torch.compile gives numbers in float64
    largest = tl.load(bits_ptr + column, mask=column < N, other=0).to(tl.float32, bitcast=True)
    scale = ship(tl.div_rn(largest, bound), least, SHIP)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr + column, scale, mask=column < N)
    mask = (row < M)[:, None] & (column < N)[None, :]
    x = tl.load(x_ptr + row[:, None] * N + column[None, :], mask=mask, other=0.0).to(tl.float32)
    q = snap(positions(x, scale[None, :], 0.0), low, high)
    codes = tl.trans(tl.where(q == q, q, 0.0).to(tl.int8))
    tl.store(codes_ptr + column[:, None] * M + row[None, :], codes, mask=(column < N)[:, None] & (row < M)[None, :])


def codes_of_columns(
    x: Tensor, *, low: float, high: float, bound: float, ships_as: torch.dtype
) -> tuple[Tensor, Tensor]:
    """int8 codes (N, M) of x transposed, and their float32 scales (N, 1): absmax / bound, rounded to `ships_as`.

    Args:
        x: (M, N), contiguous.
        low: Lowest code.
        high: Highest code.
        bound: The magnitude that one scale covers.
        ships_as: The dtype in which scales ship.
    """
    m, n = x.shape
    bits = torch.zeros(n, dtype=torch.int32, device=x.device)
    codes = torch.empty((n, m), dtype=torch.int8, device=x.device)
    scale = torch.empty((n, 1), dtype=torch.float32, device=x.device)
    across, sizes = triton.cdiv(n, _COLUMNS), {"ROWS": _ROWS, "COLUMNS": _COLUMNS}
    _largest[(triton.cdiv(m, _ROWS * _PASSES), across)](x, bits, m, n, PASSES=_PASSES, **sizes)
    limits = low, high, bound, smallest(ships_as)
    _transposed[(triton.cdiv(m, _ROWS), across)](x, bits, codes, scale, m, n, *limits, SHIP=SHIPS[ships_as], **sizes)
    return codes, scale


def codes_of_columns_slow(
    x: Tensor, *, low: float, high: float, bound: float, ships_as: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The twin of `codes_of_columns`."""
    rows = x.float().t()
    scale = rows.abs().amax(-1, keepdim=True) / torch.full((), bound, device=x.device)
    scale = scale.to(ships_as).float().clamp(min=smallest(ships_as))
    return torch.round(rows / scale).clamp(low, high).nan_to_num(0.0).to(torch.int8).contiguous(), scale
