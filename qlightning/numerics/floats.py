"""Minifloats: sign, exponent and mantissa in at most 8 bits, with the bit patterns of the OCP and IEEE tables.

| | values | largest | smallest normal | smallest subnormal | NaN, infinity |
| --- | --- | --- | --- | --- | --- |
| E2M1 | 0, 0.5, 1, 1.5, 2, 3, 4, 6 and negatives | 6 | 1 | 0.5 | none |
| E2M3 | | 7.5 | 1 | 0.125 | none |
| E3M2 | | 28 | 0.25 | 0.0625 | none |
| E4M3 | `torch.float8_e4m3fn` | 448 | 2^-6 | 2^-9 | one NaN pattern, no infinity |
| E5M2 | `torch.float8_e5m2` | 57344 | 2^-14 | 2^-16 | as IEEE |
"""

from typing import Literal

import torch
from torch import Tensor

from qlightning.numerics.formats import Format, Round
from qlightning.numerics.kernels.switch import casts_float8

_FLOAT32_MANTISSA = 23
_FLOAT32_BIAS = 127
_CAST_DTYPES = {(4, 3, "nan"): torch.float8_e4m3fn, (5, 2, "ieee"): torch.float8_e5m2}


class Float(Format):
    """A minifloat with subnormals, saturating at its largest finite value.

    >>> Float(2, 1).values()[7:]
    [-0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]

    Args:
        exponent: Exponent bits, 2 to 5.
        mantissa: Mantissa bits, 1 to 5; 1 + exponent + mantissa is at most 8.
        specials: Which bit patterns are not numbers: "none", "nan" (the all-ones pattern only) or "ieee" (the whole top
            exponent). Not given: as in the standards, that is "nan" for E4M3, "ieee" for E5M2, "none" otherwise.
    """

    code_dtype = torch.uint8

    def __init__(self, exponent: int, mantissa: int, *, specials: Literal["none", "nan", "ieee"] | None = None) -> None:
        if not (2 <= exponent <= 5 and 1 <= mantissa <= 5 and exponent + mantissa <= 7):
            raise ValueError(
                f"Float({exponent}, {mantissa}): exponent 2 to 5, mantissa 1 to 5, at most 8 bits with the sign; "
                "for example Float(4, 3)"
            )
        if specials not in (None, "none", "nan", "ieee"):
            raise ValueError(f"Float(specials={specials!r}): write 'none', 'nan' or 'ieee'")
        self.exponent, self.mantissa, self.specials = exponent, mantissa, specials
        self.bits = 1 + exponent + mantissa
        self.bias = 2 ** (exponent - 1) - 1
        self._reserved = specials or {(4, 3): "nan", (5, 2): "ieee"}.get((exponent, mantissa), "none")
        self.cast_dtype = _CAST_DTYPES.get((exponent, mantissa, self._reserved))
        self._magnitudes = [self._magnitude(code) for code in range(self._finite_codes())]
        self.high = self._magnitudes[-1]
        self.low, self.bound = -self.high, self.high

    def _finite_codes(self) -> int:
        everything = 2 ** (self.bits - 1)
        return everything - {"none": 0, "nan": 1, "ieee": 2**self.mantissa}[self._reserved]

    def _magnitude(self, code: int) -> float:
        exponent, fraction = divmod(code, 2**self.mantissa)
        if exponent == 0:
            return fraction * 2.0 ** (1 - self.bias - self.mantissa)
        return (1 + fraction / 2**self.mantissa) * 2.0 ** (exponent - self.bias)

    def snap(self, v: Tensor, rounding: Round) -> Tensor:
        v = v.clamp(self.low, self.high)
        step = self._step(v)
        return (rounding(v / step) * step).clamp_(self.low, self.high)

    def _step(self, v: Tensor) -> Tensor:
        """Distance between neighbours at `v`: a power of two, built from the exponent bits and therefore exact."""
        exponent = ((v.view(torch.int32) >> _FLOAT32_MANTISSA) & 255).clamp_(min=_FLOAT32_BIAS + 1 - self.bias)
        return ((exponent - self.mantissa) << _FLOAT32_MANTISSA).view(torch.float32)

    def encode(self, q: Tensor) -> Tensor:
        if self.cast_dtype is not None and casts_float8(q):
            return q.to(self.cast_dtype).view(torch.uint8)
        magnitude = q.abs()
        pattern = magnitude.view(torch.int32) >> (_FLOAT32_MANTISSA - self.mantissa)
        normal = pattern - ((_FLOAT32_BIAS - self.bias) << self.mantissa)
        subnormal = (magnitude * 2.0 ** (self.bias - 1 + self.mantissa)).to(torch.int32)
        code = torch.where(magnitude < 2.0 ** (1 - self.bias), subnormal, normal)
        return (code | (torch.signbit(q).to(torch.int32) << (self.bits - 1))).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        if self.cast_dtype is not None and (codes.dtype == self.cast_dtype or casts_float8(codes)):
            return codes.view(self.cast_dtype).float()
        padding = [float("nan")] * (2 ** (self.bits - 1) - len(self._magnitudes))
        positive = self._magnitudes + padding
        table = torch.tensor(positive + [-value for value in positive], dtype=torch.float32, device=codes.device)
        return table[codes.long()]

    def values(self) -> list[float]:
        return [-value for value in reversed(self._magnitudes)] + self._magnitudes
