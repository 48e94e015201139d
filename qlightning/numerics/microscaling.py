"""Scales of scales: the block formats of current hardware.

MX (OCP Microscaling 1.0): blocks of 32 share a power of two stored as E8M0. NVFP4: blocks of 16 share an E4M3 scale,
and the whole tensor one float32 scale above it. The formulas follow the OCP specification and NVIDIA's reference.
"""

from typing import Literal

import torch
from torch import Tensor

from qlightning.numerics.formats import Format
from qlightning.numerics.scales import Grid, Scale, Ship
from qlightning.numerics.statistics import absmax, divide, largest

_MANTISSA = 23
_E4M3_MAX = 448.0


class PowerOfTwo(Scale):
    """Power-of-two block scales, stored as E8M0 (the MX formats).

    With a = absmax of the block, emax the exponent of the format's largest value and max that value:

    | rule | exponent |
    | --- | --- |
    | floor | floor(log2 a) - emax (OCP; elements may saturate) |
    | ceil | ceil(log2 a) - emax |
    | rceil | ceil(log2(a / max)) (NVIDIA; nothing saturates) |
    | even | floor(log2(a rounded to one mantissa bit)) - emax |

    Args:
        rule: One of the four.
    """

    ships_as = torch.float8_e8m0fnu
    order_free = True

    def __init__(self, *, rule: Literal["floor", "ceil", "rceil", "even"] = "floor") -> None:
        super().__init__()
        if rule not in ("floor", "ceil", "rceil", "even"):
            raise ValueError(f"PowerOfTwo(rule={rule!r}): write 'floor', 'ceil', 'rceil' or 'even'")
        self.rule = rule

    def forward(self, blocks: Tensor, format: Format, ship: Ship) -> Grid:
        with torch.no_grad():
            peak = absmax(blocks.detach(), self.pool)
            top = torch.full((), format.high, dtype=torch.float32, device=blocks.device)
            exponent = {
                "floor": lambda: _floor_log2(peak) - _floor_log2(top),
                "ceil": lambda: _ceil_log2(peak) - _floor_log2(top),
                "rceil": lambda: _ceil_log2(peak / top),
                "even": lambda: _floor_log2_rounded(peak) - _floor_log2(top),
            }[self.rule]()
            scale = _power_of_two(exponent.clamp_(-127, 127))
            return Grid(torch.where(peak.isfinite(), scale, float("nan")))


class TwoLevel(Scale):
    """E4M3 block scales under one float32 scale per tensor (NVFP4).

    `tensor_scale = high * 448 / absmax(tensor)`; a block's scale is `absmax(block) / high * tensor_scale`, rounded to
    E4M3; the step is their quotient. A block whose scale rounds to zero becomes zeros, as in NVIDIA's reference.

    Args:
        rounding: How block scales are rounded to E4M3: "nearest" (NVIDIA) or "up" (the block maximum never clips, so
            that stochastic rounding stays unbiased).
    """

    ships_as = torch.float8_e4m3fn
    order_free = of_tensor = True

    def __init__(self, *, rounding: Literal["nearest", "up"] = "nearest") -> None:
        super().__init__()
        if rounding not in ("nearest", "up"):
            raise ValueError(f"TwoLevel(rounding={rounding!r}): write 'nearest' or 'up'")
        self.rounding = rounding

    def forward(self, blocks: Tensor, format: Format, ship: Ship) -> Grid:
        with torch.no_grad():
            peak = absmax(blocks.detach(), self.pool)
            overall = largest(peak, self.tensor_pool)
            tensor_scale = (format.high * _E4M3_MAX / overall).clamp(max=torch.finfo(torch.float32).max)
            ideal = (divide(peak, format.high) * tensor_scale).clamp(max=_E4M3_MAX)
            scale = ideal.to(torch.float8_e4m3fn).float()
            if self.rounding == "up":
                scale = torch.where(scale < ideal, _next_e4m3(scale), scale)
            return Grid(scale, None, tensor_scale.reshape(1))


def _next_e4m3(scale: Tensor) -> Tensor:
    """The next larger E4M3 value of non-negative E4M3 values below 448."""
    code = scale.to(torch.float8_e4m3fn).view(torch.uint8)
    return (code + 1).clamp(max=0x7E).view(torch.float8_e4m3fn).float()


def _floor_log2(x: Tensor) -> Tensor:
    """floor(log2 x) of positive float32 by its exponent bits; subnormals and zero count as 2^-127."""
    return (x.view(torch.int32) >> _MANTISSA) - 127


def _ceil_log2(x: Tensor) -> Tensor:
    has_fraction = (x.view(torch.int32) & ((1 << _MANTISSA) - 1)) != 0
    return _floor_log2(x) + has_fraction.to(torch.int32)


def _floor_log2_rounded(x: Tensor) -> Tensor:
    """floor(log2) after rounding half up to one mantissa bit."""
    return ((x.view(torch.int32) + (1 << (_MANTISSA - 2))) >> _MANTISSA) - 127


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float32 for integers -127 .. 127; 2^-127 is subnormal, so its bits are set by hand."""
    bits = torch.where(exponent > -127, (exponent + 127) << _MANTISSA, 1 << (_MANTISSA - 1))
    return bits.to(torch.int32).view(torch.float32)
