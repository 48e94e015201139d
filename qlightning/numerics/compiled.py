"""Arithmetic that torch.compile may not shorten, so that compiled quantizers give the bits of eager ones.

Inductor keeps float32 where a program says bfloat16 or float16 between two operations that it fuses, and its GPU code
divides approximately (within 2 units in the last place). Either makes another scale, or next to a tie another code,
than the one that is exported.
"""

import os
import sys

import torch
from torch import Tensor

_VARIABLE = "TORCHINDUCTOR_EMULATE_DIVISION_ROUNDING"


def divide_exactly() -> None:
    """Make inductor round divisions of float32 as eager mode does, in everything that is compiled from now on.

    The environment's TORCHINDUCTOR_EMULATE_DIVISION_ROUNDING=0 keeps the approximate ones.
    """
    wanted = os.environ.setdefault(_VARIABLE, "1") == "1"
    if (config := sys.modules.get("torch._inductor.config")) is not None:  # else it reads the variable itself
        config.eager_numerics.division_rounding = wanted


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 numbers rounded to those of float16 or bfloat16 (or left alone, for float32), as float32."""
    if not torch.compiler.is_compiling() or dtype == torch.float32:
        return x.to(dtype).float()
    return rounded_by_bits(x, dtype)


def rounded_by_bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The twin of `x.to(dtype).float()` that no compiler takes for two casts which cancel."""
    dropped = 16 if dtype == torch.bfloat16 else 13
    bits = x.view(torch.int32)
    half = (1 << (dropped - 1)) - 1
    kept = ((bits + half + ((bits >> dropped) & 1)) >> dropped << dropped).view(torch.float32)
    if dtype == torch.float16:
        kept = torch.where(x.abs() < 2.0**-14, torch.round(x * 2.0**24) * 2.0**-24, kept)  # its subnormals
        kept = torch.where(kept.abs() > torch.finfo(dtype).max, torch.copysign(x.new_full((), torch.inf), x), kept)
    return torch.where(x.isnan(), x, kept)
