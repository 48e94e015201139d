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

_CONFIGS = [
    triton.Config({"M_BLOCK": m, "N_BLOCK": n, "K_BLOCK": k}, num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in [
        (128, 256, 128, 8, 3),
        (128, 256, 64, 8, 4),
        (128, 128, 128, 8, 3),
        (128, 128, 128, 4, 3),
        (64, 128, 128, 4, 4),
    ]
]


@triton.jit
def _kernel(
    a_ptr,
    b_ptr,
    row_ptr,
    column_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    BIAS: tl.constexpr,
    M_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    program, down, across = tl.program_id(0), tl.cdiv(M, M_BLOCK), tl.cdiv(N, N_BLOCK)
    together: tl.constexpr = 8  # row blocks that share their columns in the cache
    band = program // (together * across)
    height = tl.minimum(down - band * together, together)
    m = band * together + program % (together * across) % height
    n = program % (together * across) // height
    rows, columns = m * M_BLOCK + tl.arange(0, M_BLOCK), n * N_BLOCK + tl.arange(0, N_BLOCK)
    k = tl.arange(0, K_BLOCK)
    a_at = a_ptr + (rows % M).to(tl.int64)[:, None] * K + k[None, :]
    b_at = b_ptr + (columns % N).to(tl.int64)[None, :] * K + k[:, None]
    sums = tl.zeros((M_BLOCK, N_BLOCK), tl.int32)
    for start in range(0, K, K_BLOCK):
        a = tl.load(a_at + start, mask=k[None, :] < K - start, other=0)
        b = tl.load(b_at + start, mask=k[:, None] < K - start, other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    y = sums.to(tl.float32) * tl.load(row_ptr + rows, mask=rows < M, other=0.0)[:, None]
    y = y * tl.load(column_ptr + columns, mask=columns < N, other=0.0)[None, :]
    if BIAS:
        y = y + tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    at = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(at, narrow(y, y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


_FIXED = {"M_BLOCK": 16, "N_BLOCK": 32, "K_BLOCK": 32}  # the interpreter has nothing to time
if not triton.knobs.runtime.interpret:
    _kernel, _FIXED = triton.autotune(_CONFIGS, key=["N", "K"])(_kernel), {}


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

    def grid(sizes: Mapping[str, int]) -> tuple[int]:
        return (triton.cdiv(m, sizes["M_BLOCK"]) * triton.cdiv(n, sizes["N_BLOCK"]),)

    _kernel[grid](a, b, rows, columns, rows if bias is None else bias, y, m, n, k, BIAS=bias is not None, **_FIXED)
    return y


def scaled_product_slow(
    a: Tensor, b: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The twin of `scaled_product`, with sums that are exact in float64 up to K = 2^39."""
    sums = (a.double() @ b.double().t()).to(torch.int32)
    y = sums.float() * rows.reshape(-1, 1) * columns.reshape(1, -1)
    return (y if bias is None else y + bias.float()).to(dtype)
