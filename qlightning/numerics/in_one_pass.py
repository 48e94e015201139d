"""Where a quantizer's arithmetic is done by a Triton kernel: on a GPU, for integer grids, and mostly in eager mode.

Every function answers None where the kernel does not fit; the quantizer then goes on in plain torch.
"""

from typing import Any

import torch
from torch import Tensor

from qlightning.numerics.gradients import LSQ
from qlightning.numerics.granularity import PerChannel, PerToken
from qlightning.numerics.kernels.switch import kernels_act
from qlightning.numerics.rounding import Nearest
from qlightning.numerics.scales import AbsMax, Grid

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_BLOCK, _LARGEST_CODE = 16384, 2.0**21  # what one program holds, and what the kernels round exactly


def values_and_codes(
    quantizer: Any, x: Tensor, grid: Grid, *, values: bool, codes: bool
) -> tuple[Tensor | None, Tensor | None] | None:
    """Values in x's dtype and int8 codes, as far as they are wanted."""
    blocks = _blocks(quantizer, x, grid)
    if blocks is None or (codes and quantizer.format.code_dtype != torch.int8):
        return None
    from qlightning.numerics.kernels.fake_quant import fake_quantize

    format, zero = quantizer.format, None if grid.zero_point is None else grid.zero_point.contiguous()
    options: dict[str, Any] = {"low": format.low, "high": format.high, "values": values, "codes": codes}
    _, *made = fake_quantize(blocks, grid.scale.contiguous(), zero, **options)
    placed = (None if tensor is None else quantizer.granularity.unview(tensor, x.shape) for tensor in made)
    first, second = placed
    return first, second


def codes_of_columns(quantizer: Any, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """int8 codes of x and their scales, where x is a transposed view whose rows share scales that are measured now.

    Compiled code does without: it makes the codes of an input once for all the layers that share it.
    """
    if torch.compiler.is_compiling() or not kernels_act(x) or x.dtype not in _DTYPES:
        return None
    format = quantizer.format
    codes = format.integers and format.symmetric and format.code_dtype == torch.int8
    plain = type(quantizer.scale) is AbsMax and type(quantizer.rounding) is Nearest and quantizer.transform is None
    rows = isinstance(quantizer.granularity, PerChannel | PerToken) and x.dim() == 2 and x.t().is_contiguous()
    if not (codes and plain and rows):
        return None
    from qlightning.numerics.kernels import columns

    limits = {"low": format.low, "high": format.high, "bound": format.bound}
    return columns.codes_of_columns(x.t(), **limits, ships_as=quantizer.ship_dtype(x))


def lsq_gradients(
    quantizer: Any, grad: Tensor, x: Tensor, grid: Grid, factor: float
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Gradients of x, scale and zero point by LSQ, the latter's sums times `factor`."""
    blocks = _blocks(quantizer, x, grid) if type(quantizer.gradient) is LSQ else None
    if blocks is None:
        return None
    from qlightning.numerics.kernels.fake_quant import fake_quantize_backward

    format, zero = quantizer.format, None if grid.zero_point is None else grid.zero_point.contiguous()
    rows = quantizer.granularity.view(grad).contiguous()
    limits = {"low": format.low, "high": format.high, "factor": factor}
    grad_x, grad_scale, grad_zero = fake_quantize_backward(rows, blocks, grid.scale.contiguous(), zero, **limits)
    return quantizer.granularity.unview(grad_x, grad.shape), grad_scale, grad_zero


def _blocks(quantizer: Any, x: Tensor, grid: Grid) -> Tensor | None:
    """The contiguous blocks that a kernel works on, or None where it does not fit."""
    if torch.compiler.is_compiling() or not kernels_act(x) or not quantizer.format.integers:
        return None
    if quantizer.transform is not None or grid.inner is not None or grid.tensor_scale is not None:
        return None
    if not isinstance(quantizer.rounding, Nearest) or quantizer.format.high > _LARGEST_CODE:
        return None
    if x.dtype not in _DTYPES:
        return None
    blocks: Tensor = quantizer.granularity.view(x)
    fits = blocks.shape[-1] <= _LARGEST_BLOCK and grid.scale.numel() * blocks.shape[-1] == blocks.numel()
    return blocks.contiguous() if fits else None
