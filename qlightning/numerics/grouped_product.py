"""Products of int8 codes of which one operand has a scale per group along what is contracted: "int4-g128" weights.

y = (sum over groups g of (a_g b_g^T) * scales of b's group g) * scales of a + bias. Sums inside a group are exact; they
are scaled and added up in float32, group by group from the first on, on every device alike. With r the rounding of the
dtype of decoded operands, the result and the product of those differ by at most (2 r + (K + G) 2^-24) sum |a||b| and
one rounding of the result each, for G groups of K columns in all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qlightning.numerics.kernels.switch import kernels_act

_SIZES = (32, 64, 128, 256)  # of groups that the kernel takes


def product_in_groups(
    a: Tensor, b: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(M, N) in `dtype`.

    Args:
        a: int8 (M, K).
        b: int8 (N, K).
        rows: float32, M elements.
        columns: float32 (N, G), where G divides K.
        bias: (N,), or None.
        dtype: Of the result.
    """
    size = a.shape[1] // columns.shape[1]
    rows, columns = rows.contiguous(), columns.contiguous()
    if size in _SIZES and kernels_act(a):
        return grouped_int8(a.contiguous(), b.contiguous(), rows, columns, bias, dtype)
    y = torch.zeros(a.shape[0], b.shape[0], device=a.device)
    for group, scale in enumerate(columns.unbind(1)):
        own = slice(group * size, (group + 1) * size)
        y = y + int8_sums(a[:, own], b[:, own]).float() * scale
    y = y * rows[:, None]
    return (y if bias is None else y + bias.float()).to(dtype)


@torch.library.custom_op("qlightning::grouped_int8", mutates_args=())
def grouped_int8(
    a: Tensor, b: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """As an operator that torch.compile does not look into: see `kernels.grouped_product`."""
    from qlightning.numerics.kernels.grouped_product import grouped_product

    return grouped_product(a, b, rows, columns, bias, dtype)


@grouped_int8.register_fake
def _(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


def int8_sums(a: Tensor, b: Tensor) -> Tensor:
    """int32 (M, N), exact. cuBLAS wants more than 16 rows and multiples of 8; zeros add nothing."""
    m, n = a.shape[0], b.shape[0]
    if a.device.type == "cuda":
        a, b = padded(a, max(32, -(-m // 8) * 8), 8), padded(b, -(-n // 8) * 8, 8)
    return torch._int_mm(a.contiguous(), b.contiguous().t())[:m, :n]


def padded(codes: Tensor, rows: int, multiple: int) -> Tensor:
    """Contiguous, with so many rows and a multiple of columns."""
    missing = rows - codes.shape[0], -codes.shape[1] % multiple
    if not any(missing):
        return codes.contiguous()
    return F.pad(codes.view(torch.uint8), (0, missing[1], 0, missing[0])).view(codes.dtype)
