"""Triton: packed 4-bit codes to values, in one pass: half a byte is read for every value."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlightning.numerics.kernels.fake_quant import narrow
from qlightning.numerics.packing import unpack

_ELEMENTS = 4096


@triton.jit
def _kernel(
    packed_ptr,
    scale_ptr,
    zero_ptr,
    values_ptr,
    count,
    GROUP: tl.constexpr,
    BYTES: tl.constexpr,
    SIGNED: tl.constexpr,
    ZERO: tl.constexpr,
):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    mask = byte < count
    both = tl.load(packed_ptr + byte, mask=mask, other=0).to(tl.int32)
    codes = tl.join(both & 15, both >> 4)
    if SIGNED:
        codes = codes - ((codes >> 3) << 4)
    group = (byte * 2 // GROUP)[:, None] + tl.zeros((1, 2), tl.int32)
    scale = tl.load(scale_ptr + group, mask=mask[:, None], other=1.0)
    q = codes.to(tl.float32)
    if ZERO:
        q = q - tl.load(zero_ptr + group, mask=mask[:, None], other=0.0)
    at = (byte * 2)[:, None] + tl.arange(0, 2)[None, :]
    tl.store(values_ptr + at, narrow(q * scale, values_ptr.dtype.element_ty), mask=mask[:, None])


def unpack_int4(
    packed: Tensor, scale: Tensor, zero: Tensor | None = None, *, dtype: torch.dtype, signed: bool = True
) -> Tensor:
    """Values of packed 4-bit codes.

    Args:
        packed: uint8 (rows, columns / 2), as `pack(codes, 4)` makes it, contiguous.
        scale: float32 (rows, groups, 1); groups divide the columns into even numbers.
        zero: float32 of the scale's shape.
        dtype: Of the values.
        signed: Whether codes are two's complement.

    Returns:
        (rows, columns) in `dtype`.
    """
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    group = _group(scale, rows, columns)
    values = torch.empty((rows, columns), dtype=dtype, device=packed.device)
    _kernel[(triton.cdiv(packed.numel(), _ELEMENTS),)](
        packed, scale, scale if zero is None else zero, values, packed.numel(),
        GROUP=group, BYTES=_ELEMENTS, SIGNED=signed, ZERO=zero is not None,
    )  # fmt: skip
    return values


def unpack_int4_slow(
    packed: Tensor, scale: Tensor, zero: Tensor | None = None, *, dtype: torch.dtype, signed: bool = True
) -> Tensor:
    """The twin of `unpack_int4`."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    codes = unpack(packed, 4, columns, signed=signed).float().view(rows, -1, _group(scale, rows, columns))
    grid = scale.view(rows, -1, 1)
    q = codes if zero is None else codes - zero.view(rows, -1, 1)
    return (q * grid).to(dtype).view(rows, columns)


def _group(scale: Tensor, rows: int, columns: int) -> int:
    groups = scale.numel() // rows
    if scale.numel() % rows or columns % groups or columns // groups % 2:
        raise ValueError(
            f"scales of shape {tuple(scale.shape)} do not divide {columns} columns into groups of an even size"
        )
    return columns // groups
