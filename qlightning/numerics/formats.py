"""Formats: which values exist.

A format is a finite set of numbers on a unit grid, together with the codes that name them. It knows nothing of scales:
a quantizer divides by the scale first, so a format always sees `v = x / scale (+ zero_point)`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from qlightning.numerics.part import Part

Round = Callable[[Tensor], Tensor]
"""Maps real positions on an integer lattice to integers, elementwise (nearest or stochastic); may overwrite them."""


class Format(Part, ABC):
    """A finite set of representable values and their integer codes.

    Attributes:
        bits: Storage bits of one code.
        low: Smallest representable value.
        high: Largest representable value.
        bound: The magnitude that `scale = 1` is meant to cover: `scale = absmax / bound`.
        symmetric: False when the format is meant to be used with a zero point.
        code_dtype: Integer dtype of the codes.
        cast_dtype: torch's dtype of the same values, to which a cast rounds to the nearest one (ties to even), or None.
        integers: Whether its values are the integers from `low` to `high`, where it saturates.
    """

    bits: int
    low: float
    high: float
    bound: float
    symmetric: bool = True
    integers: bool = False
    code_dtype: torch.dtype = torch.int8
    cast_dtype: torch.dtype | None = None

    @abstractmethod
    def snap(self, v: Tensor, rounding: Round) -> Tensor:
        """Round to representable values, saturating at `low` and `high`. NaN stays NaN.

        Args:
            v: float32 of any shape; may be overwritten.
            rounding: What rounds positions between two neighbours.
        """

    @abstractmethod
    def encode(self, q: Tensor) -> Tensor:
        """Codes (`code_dtype`, same shape) of finite representable values `q` (float32)."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Values (float32, same shape) of codes: the inverse of `encode`."""

    @abstractmethod
    def values(self) -> list[float]:
        """All representable values, ascending."""


def code_dtype(bits: int) -> torch.dtype:
    return torch.int8 if bits <= 8 else torch.int16


class Int(Format):
    """Signed integers of `bits` bits.

    >>> Int(4).low, Int(4).high, Int(4).bound
    (-8.0, 7.0, 7.5)
    >>> Int(4, range="narrow").low, Int(4, range="narrow").bound
    (-7.0, 7.0)

    Args:
        bits: 1 to 16 (2 to 16 when symmetric).
        symmetric: Without (True) or with (False) a zero point.
        range: "full" uses all 2^bits codes and covers absmax by (2^bits - 1) / 2, as torchao and compressed-tensors do:
            -absmax lies in the middle of the two lowest codes, where its last bit decides; "narrow" drops the most
            negative code, so that -x is representable whenever x is.
    """

    integers = True

    def __init__(self, bits: int, *, symmetric: bool = True, range: Literal["full", "narrow"] = "full") -> None:
        if not 1 <= bits <= 16:
            raise ValueError(f"Int(bits={bits}): integers have 1 to 16 bits, for example Int(4)")
        if symmetric and bits == 1:
            raise ValueError("Int(1) without a zero point has no positive value: write Binary(), or 'binary' in a spec")
        if range not in ("full", "narrow"):
            raise ValueError(f"Int(range={range!r}): write range='full' or range='narrow'")
        if range == "narrow" and not symmetric:
            raise ValueError(f"a zero point uses all codes: write Int({bits}, symmetric=False) without range='narrow'")
        self.bits, self.symmetric, self.range = bits, symmetric, range
        self.high = float(2 ** (bits - 1) - 1)
        self.low = -self.high if range == "narrow" else -self.high - 1
        self.bound = (self.high - self.low) / 2
        self.code_dtype = code_dtype(bits)

    def snap(self, v: Tensor, rounding: Round) -> Tensor:
        return rounding(v).clamp_(self.low, self.high)

    def encode(self, q: Tensor) -> Tensor:
        return q.to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)

    def values(self) -> list[float]:
        return [float(v) for v in range(int(self.low), int(self.high) + 1)]


class UInt(Format):
    """Unsigned integers 0 .. 2^bits - 1 without a zero point, for values that cannot be negative (probabilities).

    Args:
        bits: 1 to 8.
    """

    code_dtype, integers = torch.uint8, True

    def __init__(self, bits: int) -> None:
        if not 1 <= bits <= 8:
            raise ValueError(f"UInt(bits={bits}): unsigned integers have 1 to 8 bits, for example UInt(8)")
        self.bits = bits
        self.low, self.high = 0.0, float(2**bits - 1)
        self.bound = self.high

    def snap(self, v: Tensor, rounding: Round) -> Tensor:
        return rounding(v).clamp_(self.low, self.high)

    def encode(self, q: Tensor) -> Tensor:
        return q.to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)

    def values(self) -> list[float]:
        return [float(v) for v in range(2**self.bits)]


class Ternary(Format):
    """{-1, 0, 1}: two storage bits, 1.58 bits of information."""

    bits, low, high, bound, integers = 2, -1.0, 1.0, 1.0, True

    def snap(self, v: Tensor, rounding: Round) -> Tensor:
        return rounding(v).clamp_(-1.0, 1.0)

    def encode(self, q: Tensor) -> Tensor:
        return q.to(torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)

    def values(self) -> list[float]:
        return [-1.0, 0.0, 1.0]


class Binary(Format):
    """{-1, +1}. The code is the sign bit (1 means -1), and zero counts as positive.

    >>> Binary().snap(torch.tensor([-0.2, 0.0, 3.0]), torch.round)
    tensor([-1.,  1.,  1.])
    """

    bits, low, high, bound = 1, -1.0, 1.0, 1.0
    code_dtype = torch.uint8

    def snap(self, v: Tensor, rounding: Round) -> Tensor:
        negative = ((1 - v) / 2).clamp_(0.0, 1.0)
        # 1 - v is 1 for the smallest negative values: keep them on their side of the tie
        return 1 - 2 * rounding(torch.where(v < 0, negative.clamp(min=0.5 + 2.0**-24), negative))

    def encode(self, q: Tensor) -> Tensor:
        return (q < 0).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return 1 - 2 * codes.to(torch.float32)

    def values(self) -> list[float]:
        return [-1.0, 1.0]
