"""Products of codes: int8 or E4M3 operands are multiplied as they are, and their scales with the sums.

With codes a (M, K) and b (N, K) and one scale per row of each, y = (a b^T) * scales of a * scales of b + bias is what
the product of the decoded operands would be in exact arithmetic. On a GPU such products run at twice the rate of
bfloat16 ones.

Integer sums are exact: the result is off by the roundings of the two scalings and of the result alone. The product of
decoded operands rounds every operand to its dtype and adds in some order. With r the rounding of that dtype (2^-9 in
bfloat16, 2^-24 in float32), the two differ by at most (2 r + K 2^-24) sum |a||b| and one rounding of the result each.
E4M3 products are exact too, but their sums are taken in the float32 (on Hopper: shorter) accumulators of the tensor
cores; with results in another dtype than bfloat16 they are float32 products, which are no faster.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qlightning.numerics.grouped_product import int8_sums, padded, product_in_groups
from qlightning.numerics.kernels.switch import kernels_act

LONGEST = (2**31 - 1) // 128**2
"""Up to this K sums of int8 products fit into 32 bits whatever the codes are."""


class Coded(NamedTuple):
    """A matrix as codes.

    Attributes:
        codes: (rows, K), int8 or `torch.float8_e4m3fn`.
        scale: float32, one element per row, or a single one; of int8 b (rows, groups), which divide its columns.
    """

    codes: Tensor
    scale: Tensor


def product_of_codes(a: Coded, b: Coded, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(a b^T) * scales of a * scales of b + bias, (M, N) in `dtype`.

    Args:
        a: (M, K).
        b: (N, K), of the same kind of codes.
        bias: (N,), or None.
        dtype: Of the result.

    Raises:
        ValueError: One operand is int8 and the other is not, or int8 sums may not fit into 32 bits.
    """
    if a.codes.dtype != b.codes.dtype:
        raise ValueError(f"codes of {a.codes.dtype} and {b.codes.dtype} are not multiplied: both int8 or both E4M3")
    rows = a.scale.reshape(-1).expand(a.codes.shape[0])
    if b.scale.ndim == 2 and b.scale.shape[1] > 1:
        return product_in_groups(a.codes, b.codes, rows, b.scale, bias, dtype)
    columns = b.scale.reshape(-1).expand(b.codes.shape[0])
    if a.codes.dtype == torch.int8:
        if a.codes.shape[1] > LONGEST:
            raise ValueError(f"sums of {a.codes.shape[1]} int8 products may not fit into 32 bits: at most {LONGEST}")
        if kernels_act(a.codes):
            from qlightning.numerics.kernels.product import scaled_product

            codes, others = a.codes.contiguous(), b.codes.contiguous()
            return scaled_product(codes, others, rows.contiguous(), columns.contiguous(), bias, dtype)
        sums = int8_sums(a.codes, b.codes)
    elif a.codes.device.type == "cuda" and dtype == torch.bfloat16:
        return _scaled_float8(a.codes, b.codes, rows, columns, bias)
    else:
        sums = a.codes.float() @ b.codes.float().t()
    y = sums.float() * rows[:, None] * columns
    return (y if bias is None else y + bias.float()).to(dtype)


def _scaled_float8(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """bfloat16 (M, N): with a scale per row cuBLAS gives nothing else, and it wants multiples of 16."""
    n = b.shape[0]
    missing = -n % 16
    a, b = padded(a, a.shape[0], 16), padded(b, n + missing, 16)
    scales = rows[:, None].contiguous(), F.pad(columns, (0, missing), value=1.0)[None, :].contiguous()
    bias = None if bias is None else F.pad(bias.to(torch.bfloat16), (0, missing))
    y = torch._scaled_mm(a, b.t(), *scales, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=False)
    return y[:, :n]
