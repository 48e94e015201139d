"""Triton: a product of int8 codes, whose sums are scaled before they are written.

`torch._int_mm` writes int32 sums of twice the size of bfloat16 results, which another pass must read and scale; at the
sizes of language models that costs what the faster product saves. The integer sums are exact, so the result is the
twin's bit for bit wherever both scale in the same order.

Legend: a (M, K), b (N, K), y (M, N) = (a b^T) * row scales (M) * column scales (N) + bias (N).
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlightning.numerics.kernels.fake_quant import narrow
from qlightning.numerics.kernels.switch import copies_blocks, processors

_CONFIGS = [
    triton.Config({"M_BLOCK": m, "N_BLOCK": n, "K_BLOCK": k}, num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in [
        (128, 256, 128, 8, 3),
        (256, 128, 128, 8, 3),
        (128, 128, 128, 4, 4),
        (64, 128, 128, 4, 4),
    ]
]


@triton.jit
def place(program, M, N, M_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr):
    """Which block of y a program makes: eight row blocks in turn share their columns in the cache."""
    down, across = tl.cdiv(M, M_BLOCK), tl.cdiv(N, N_BLOCK)
    together: tl.constexpr = 8
    band = program // (together * across)
    height = tl.minimum(down - band * together, together)
    return band * together + program % (together * across) % height, program % (together * across) // height


@triton.jit
def scaled(sums, row_ptr, column_ptr, bias_ptr, rows, columns, M, N, BIAS: tl.constexpr, DTYPE: tl.constexpr):
    y = sums.to(tl.float32) * tl.load(row_ptr + rows, mask=rows < M, other=0.0)[:, None]
    y = y * tl.load(column_ptr + columns, mask=columns < N, other=0.0)[None, :]
    if BIAS:
        y = y + tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    return narrow(y, DTYPE)


@triton.jit
def _by_pointers(
    a_ptr,
    b_ptr,
    row_ptr,
    column_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    programs,  # as many as there are blocks
    BIAS: tl.constexpr,
    M_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    m, n = place(tl.program_id(0), M, N, M_BLOCK, N_BLOCK)
    rows, columns = m * M_BLOCK + tl.arange(0, M_BLOCK), n * N_BLOCK + tl.arange(0, N_BLOCK)
    k = tl.arange(0, K_BLOCK)
    a_at = a_ptr + (rows % M).to(tl.int64)[:, None] * K + k[None, :]  # rows beyond M are others again, not stored
    b_at = b_ptr + (columns % N).to(tl.int64)[None, :] * K + k[:, None]
    sums = tl.zeros((M_BLOCK, N_BLOCK), tl.int32)
    for start in range(0, K, K_BLOCK):
        a = tl.load(a_at + start, mask=k[None, :] < K - start, other=0)
        b = tl.load(b_at + start, mask=k[:, None] < K - start, other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    y = scaled(sums, row_ptr, column_ptr, bias_ptr, rows, columns, M, N, BIAS, y_ptr.dtype.element_ty)
    at = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(at, y, mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def _by_descriptors(
    a_ptr,
    b_ptr,
    row_ptr,
    column_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    programs,
    BIAS: tl.constexpr,
    M_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """The same through Hopper's copy engine, by programs that stay on their processors and overlap their blocks."""
    a_blocks = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [M_BLOCK, K_BLOCK])
    b_blocks = tl.make_tensor_descriptor(b_ptr, [N, K], [K, 1], [N_BLOCK, K_BLOCK])
    y_blocks = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [M_BLOCK, N_BLOCK])
    blocks = tl.cdiv(M, M_BLOCK) * tl.cdiv(N, N_BLOCK)
    for block in tl.range(tl.program_id(0), blocks, programs, flatten=True):
        m, n = place(block, M, N, M_BLOCK, N_BLOCK)
        sums = tl.zeros((M_BLOCK, N_BLOCK), tl.int32)
        for start in range(0, K, K_BLOCK):
            a, b = a_blocks.load([m * M_BLOCK, start]), b_blocks.load([n * N_BLOCK, start])
            sums = tl.dot(a, b.T, sums, out_dtype=tl.int32)
        rows, columns = m * M_BLOCK + tl.arange(0, M_BLOCK), n * N_BLOCK + tl.arange(0, N_BLOCK)
        y = scaled(sums, row_ptr, column_ptr, bias_ptr, rows, columns, M, N, BIAS, y_ptr.dtype.element_ty)
        y_blocks.store([m * M_BLOCK, n * N_BLOCK], y)


_FIXED = {"M_BLOCK": 16, "N_BLOCK": 32, "K_BLOCK": 32}  # the interpreter has nothing to time
if not triton.knobs.runtime.interpret:
    _by_pointers = triton.autotune(_CONFIGS, key=["N", "K"])(_by_pointers)
    _by_descriptors, _FIXED = triton.autotune(_CONFIGS[:3], key=["N", "K"])(_by_descriptors), {}


def scaled_product(
    a: Tensor, b: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(a b^T) * rows * columns + bias in `dtype`, of int8 codes.

    Args:
        a: int8 (M, K), contiguous.
        b: int8 (N, K), contiguous.
        rows: float32, M elements.
        columns: float32, N elements.
        bias: (N,) or None.
        dtype: Of the result.
    """
    (m, k), n = a.shape, b.shape[0]
    y = torch.empty((m, n), dtype=dtype, device=a.device)
    engine = k % 16 == 0 and n % 8 == 0 and copies_blocks(a)  # it wants rows of multiples of 16 bytes
    programs = processors(a) if engine else 0

    def grid(sizes: Mapping[str, int]) -> tuple[int]:
        blocks = triton.cdiv(m, sizes["M_BLOCK"]) * triton.cdiv(n, sizes["N_BLOCK"])
        return (min(blocks, programs) if engine else blocks,)

    operands = a, b, rows, columns, rows if bias is None else bias, y
    kernel = _by_descriptors if engine else _by_pointers
    if engine and not torch.compiler.is_compiling():  # inductor has one of its own
        triton.set_allocator(_scratch)
    kernel[grid](*operands, m, n, k, programs, BIAS=bias is not None, **_FIXED)
    return y


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors of blocks."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def scaled_product_slow(
    a: Tensor, b: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The twin of `scaled_product`, with sums that are exact in float64 up to K = 2^39."""
    sums = (a.double() @ b.double().t()).to(torch.int32)
    y = sums.float() * rows.reshape(-1, 1) * columns.reshape(1, -1)
    return (y if bias is None else y + bias.float()).to(dtype)
