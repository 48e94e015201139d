"""Triton: a product of int8 codes of which one operand has a scale per group of columns.

Inside a group integer sums are exact. Each is scaled in float32 and added to those of the groups before it, so the
groups' order is part of the definition, and multiplications and additions are not fused: the result is the twin's bit
for bit.

Legend: a (M, K), b (N, K), G groups of K / G columns;
y (M, N) = (sum over g of (a_g b_g^T) * column scales (N, g)) * row scales (M) + bias (N).
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlightning.numerics.kernels.fake_quant import narrow

_CONFIGS = [
    triton.Config({"M_BLOCK": m, "N_BLOCK": n}, num_warps=warps, num_stages=stages)
    for m, n, warps, stages in [(128, 128, 8, 3), (128, 128, 8, 4), (64, 256, 8, 3), (128, 64, 4, 4), (64, 128, 4, 4)]
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
    GROUP: tl.constexpr,
    M_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
):
    program, down, across = tl.program_id(0), tl.cdiv(M, M_BLOCK), tl.cdiv(N, N_BLOCK)
    together: tl.constexpr = 8  # row blocks that share their columns in the cache
    band = program // (together * across)
    height = tl.minimum(down - band * together, together)
    m = band * together + program % (together * across) % height
    n = program % (together * across) // height
    rows, columns = m * M_BLOCK + tl.arange(0, M_BLOCK), n * N_BLOCK + tl.arange(0, N_BLOCK)
    k = tl.arange(0, GROUP)
    a_at = a_ptr + (rows % M).to(tl.int64)[:, None] * K + k[None, :]
    b_at = b_ptr + (columns % N).to(tl.int64)[None, :] * K + k[:, None]
    scale_at = column_ptr + (columns % N).to(tl.int64) * (K // GROUP)
    y = tl.zeros((M_BLOCK, N_BLOCK), tl.float32)
    for group in range(0, K // GROUP):
        sums = tl.dot(tl.load(a_at + group * GROUP), tl.load(b_at + group * GROUP), out_dtype=tl.int32)
        y = y + sums.to(tl.float32) * tl.load(scale_at + group)[None, :]
    y = y * tl.load(row_ptr + rows, mask=rows < M, other=0.0)[:, None]
    if BIAS:
        y = y + tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    at = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(at, narrow(y, y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


_FIXED = {"M_BLOCK": 16, "N_BLOCK": 32}  # the interpreter has nothing to time
if not triton.knobs.runtime.interpret:
    _kernel, _FIXED = triton.autotune(_CONFIGS, key=["N", "K", "GROUP"])(_kernel), {}


def grouped_product(
    a: Tensor, b: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """int8 codes to (M, N) in `dtype`; groups are of 32, 64, 128 or 256 columns.

    Args:
        a: int8 (M, K), contiguous.
        b: int8 (N, K), contiguous.
        rows: float32, M elements.
        columns: float32 (N, G), contiguous.
        bias: (N,) or None.
        dtype: Of the result.
    """
    (m, k), n = a.shape, b.shape[0]
    y = torch.empty((m, n), dtype=dtype, device=a.device)

    def grid(sizes: Mapping[str, int]) -> tuple[int]:
        return (triton.cdiv(m, sizes["M_BLOCK"]) * triton.cdiv(n, sizes["N_BLOCK"]),)

    _kernel[grid](
        a, b, rows, columns, rows if bias is None else bias, y, m, n, k,
        BIAS=bias is not None, GROUP=k // columns.shape[1], enable_fp_fusion=False, **_FIXED,
    )  # fmt: skip
    return y


def grouped_product_slow(
    a: Tensor, b: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The twin of `grouped_product`, for groups of any size."""
    y = torch.zeros(a.shape[0], b.shape[0], device=a.device)
    size = a.shape[1] // columns.shape[1]
    for group, scale in enumerate(columns.unbind(1)):
        own = slice(group * size, (group + 1) * size)
        sums = a[:, own].double() @ b[:, own].double().t()  # exact
        y = y + sums.float() * scale
    y = y * rows.reshape(-1, 1)
    return (y if bias is None else y + bias.float()).to(dtype)
