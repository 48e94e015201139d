"""Triton: absmax, scale, rounding and decoding of one block in one pass, and the sums of its backward.

The twin of each kernel is the same formula in plain torch, under the name with `_slow`. Forward is equal bit for bit
(zeros may differ in sign); the sums of backward are taken in another order.

Legend: blocks are (R blocks, N elements) that share a scale, contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_BLOCK = 16384
"""Elements that may share a scale: one program holds them all."""

_ELEMENTS = 4096  # of one program, where blocks are smaller


@triton.jit
def round_even(v):
    """To the nearest integer, ties to even, for |v| < 2^22: float32 has no bits for a fraction beyond 2^23."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 to DTYPE, to nearest even. Triton's interpreter cuts bits off, so bfloat16 is rounded by hand."""
    if tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, kept.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def ship(scale, smallest, DTYPE: tl.constexpr):
    """The scale rounded to the dtype it ships in, at least `smallest`; NaN stays."""
    shipped = narrow(scale, DTYPE).to(tl.float32)
    return tl.where(shipped < smallest, smallest, shipped)


@triton.jit
def positions(x, scale, zero):
    return tl.div_rn(x, scale) + zero


@triton.jit
def snap(v, low, high):
    """Integers in the range; NaN stays."""
    inside = tl.minimum(tl.maximum(v, low), high)
    return tl.where(v == v, round_even(inside), v)


@triton.jit
def absmax(x):
    """Largest magnitude of each row, (rows, 1); NaN where the row holds one."""
    poisoned = tl.max((x != x).to(tl.int32), axis=1, keep_dims=True)
    largest = tl.max(tl.abs(tl.where(x == x, x, 0.0)), axis=1, keep_dims=True)
    return tl.where(poisoned > 0, float("nan"), largest)


@triton.jit
def _forward(
    x_ptr,
    scale_ptr,
    zero_ptr,
    values_ptr,
    codes_ptr,
    blocks,
    low,
    high,
    bound,
    smallest,
    N: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    SHIP: tl.constexpr,
    MEASURE: tl.constexpr,
    ZERO: tl.constexpr,
    VALUES: tl.constexpr,
    CODES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    inside = row < blocks
    mask = inside & (column < N)
    at = row * N + column
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if MEASURE:
        scale = ship(tl.div_rn(absmax(x), bound), smallest, SHIP)
        tl.store(scale_ptr + row, scale, mask=inside)
    else:
        scale = tl.load(scale_ptr + row, mask=inside, other=1.0)
    zero = tl.load(zero_ptr + row, mask=inside, other=0.0) if ZERO else 0.0
    q = snap(positions(x, scale, zero), low, high)
    if CODES:
        tl.store(codes_ptr + at, tl.where(q == q, q, 0.0).to(tl.int8), mask=mask)
    if VALUES:
        tl.store(values_ptr + at, narrow((q - zero) * scale, values_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    grad_ptr,
    x_ptr,
    scale_ptr,
    zero_ptr,
    grad_x_ptr,
    grad_scale_ptr,
    grad_zero_ptr,
    blocks,
    low,
    high,
    factor,
    N: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    ZERO: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    inside = row < blocks
    mask = inside & (column < N)
    at = row * N + column
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + row, mask=inside, other=1.0)
    zero = tl.load(zero_ptr + row, mask=inside, other=0.0) if ZERO else 0.0
    v = positions(x, scale, zero)
    q = snap(v, low, high)
    passes = (v >= low) & (v <= high)
    tl.store(grad_x_ptr + at, tl.where(passes, grad, grad * 0.0).to(grad_x_ptr.dtype.element_ty), mask=mask)
    moved = (q - zero) - tl.where(passes, v - zero, (v - zero) * 0.0)
    total = tl.sum(tl.where(mask, grad * moved, 0.0), axis=1, keep_dims=True)
    tl.store(grad_scale_ptr + row, total * factor, mask=inside)
    if ZERO:
        outside = tl.sum(tl.where(mask & (passes == 0), -grad, 0.0), axis=1, keep_dims=True)
        tl.store(grad_zero_ptr + row, outside * scale * factor, mask=inside)


SHIPS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def fake_quantize(
    blocks: Tensor,
    scale: Tensor | None,
    zero: Tensor | None = None,
    *,
    low: float,
    high: float,
    bound: float = 1.0,
    ships_as: torch.dtype = torch.float32,
    values: bool = True,
    codes: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Blocks on an integer grid.

    Args:
        blocks: (..., N), contiguous.
        scale: float32 (..., 1); measured where it is None: absmax / bound, rounded to `ships_as`.
        zero: float32 (..., 1), with a scale only.
        low: Lowest code.
        high: Highest code.
        bound: The magnitude that one scale covers, where it is measured.
        ships_as: The dtype in which a measured scale ships.
        values: Whether values are wanted.
        codes: Whether int8 codes are wanted (0 where x is NaN).

    Returns:
        (scale, values in the blocks' dtype, int8 codes); what was not wanted is None.
    """
    n = blocks.shape[-1]
    measure = scale is None
    if scale is None:
        scale = torch.empty((*blocks.shape[:-1], 1), dtype=torch.float32, device=blocks.device)
    made = torch.empty_like(blocks) if values else None
    coded = torch.empty_like(blocks, dtype=torch.int8) if codes else None
    grid, sizes = _launch(blocks)
    _forward[grid](
        blocks, scale, scale if zero is None else zero, blocks if made is None else made,
        blocks if coded is None else coded, scale.numel(), low, high, bound, smallest(ships_as), n,
        **sizes, SHIP=SHIPS[ships_as], MEASURE=measure, ZERO=zero is not None, VALUES=values, CODES=codes,
    )  # fmt: skip
    return scale, made, coded


def fake_quantize_backward(
    grad: Tensor, blocks: Tensor, scale: Tensor, zero: Tensor | None = None, *, low: float, high: float, factor: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `fake_quantize` with respect to blocks, scale and zero, by LSQ: straight through inside the range.

    Args:
        grad: Gradient of the values, (..., N), contiguous.
        blocks: What was quantized.
        scale: float32 (..., 1).
        zero: float32 (..., 1).
        low: Lowest code.
        high: Highest code.
        factor: What the sums are multiplied by.
    """
    grad_x, grad_scale = torch.empty_like(grad), torch.empty_like(scale)
    grad_zero = None if zero is None else torch.empty_like(zero)
    grid, sizes = _launch(blocks)
    _backward[grid](
        grad, blocks, scale, scale if zero is None else zero, grad_x, grad_scale,
        grad_scale if grad_zero is None else grad_zero, scale.numel(), low, high, factor, blocks.shape[-1],
        **sizes, ZERO=zero is not None,
    )  # fmt: skip
    return grad_x, grad_scale, grad_zero


def fake_quantize_slow(
    blocks: Tensor,
    scale: Tensor | None,
    zero: Tensor | None = None,
    *,
    low: float,
    high: float,
    bound: float = 1.0,
    ships_as: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin of `fake_quantize`: scale, values and codes."""
    x = blocks.float()
    if scale is None:
        scale = x.abs().amax(-1, keepdim=True) / torch.full((), bound, device=x.device)
        scale = scale.to(ships_as).float().clamp(min=smallest(ships_as))
    q = torch.round(x / scale + (0.0 if zero is None else zero)).clamp(low, high)
    values = (q if zero is None else q - zero) * scale
    return scale, values.to(blocks.dtype), q.nan_to_num(0.0).to(torch.int8)


def fake_quantize_backward_slow(
    grad: Tensor, blocks: Tensor, scale: Tensor, zero: Tensor | None = None, *, low: float, high: float, factor: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The twin of `fake_quantize_backward`."""
    offset = torch.zeros_like(scale) if zero is None else zero
    v = blocks.float() / scale + offset
    q, slope = torch.round(v).clamp(low, high), ((v >= low) & (v <= high)).float()
    g = grad.float()
    grad_scale = (g * ((q - offset) - slope * (v - offset))).sum(-1, keepdim=True) * factor
    grad_zero = None if zero is None else (g * (slope - 1)).sum(-1, keepdim=True) * scale * factor
    return (g * slope).to(grad.dtype), grad_scale, grad_zero


def smallest(ships_as: torch.dtype) -> float:
    return 2.0**-24 if ships_as == torch.float16 else torch.finfo(torch.float32).smallest_normal


def _launch(blocks: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """How many programs, and the sizes of one."""
    n = blocks.shape[-1]
    padded = triton.next_power_of_2(n)
    if padded > LARGEST_BLOCK:
        raise ValueError(f"blocks of {n} elements do not fit into one program: at most {LARGEST_BLOCK}")
    rows = max(1, _ELEMENTS // padded)
    return (triton.cdiv(blocks.numel() // n, rows),), {"PADDED": padded, "ROWS": rows}
