"""Grids whose levels are the middles of equal bins: with an even number of them there is no zero (mid-rise)."""

import torch
from torch import Tensor

from qlightning.numerics.formats import Format, Round, code_dtype
from qlightning.numerics.statistics import divide


class Bins(Format):
    """[-1, 1] in equal bins, each represented by its middle: with n = levels / 2 the values (k + offset) / n.

    An even number of levels has codes k = -n .. n - 1 and offset 1/2 (no zero, as in ParetoQ's two bits and OFQ's
    StatsQ); an odd number has codes symmetric about 0 and offset 0 (ParetoQ's ternary). `scale = 1` covers [-1, 1]:
    absmax puts the largest magnitude at the outer edge of the outermost bin, not on a level.

    >>> Bins(4).values()
    [-0.75, -0.25, 0.25, 0.75]
    >>> Bins(4).encode(torch.tensor([-0.75, 0.25])), Bins(4).offset
    (tensor([-2,  0], dtype=torch.int8), 0.5)
    >>> Bins(3).snap(torch.tensor([-2.0, 0.3, 0.4]), torch.round)
    tensor([-0.6667,  0.0000,  0.6667])

    Args:
        levels: Number of bins, 2 to 65536; 2^bits fill that many bits.

    Attributes:
        offset: What is added to a code before it is divided by levels / 2: an integer runtime that has no such offset
            reads the value as scale * 2 / levels * (code - zero point) with zero point -offset.
    """

    bound = 1.0

    def __init__(self, levels: int) -> None:
        if not 2 <= levels <= 2**16:
            raise ValueError(f"Bins(levels={levels}): 2 to 65536 bins, for example Bins(4) for two bits")
        self.levels = levels
        self.bits = (levels - 1).bit_length()
        self.offset = 0.0 if levels % 2 else 0.5
        self._last = float((levels - 1) // 2)
        self._first = -self._last - 2 * self.offset
        self.high = (self._last + self.offset) * 2 / levels
        self.low = -self.high
        self.code_dtype = code_dtype(self.bits)

    def snap(self, v: Tensor, rounding: Round) -> Tensor:
        return self._value(rounding(v * (self.levels / 2) - self.offset).clamp_(self._first, self._last))

    def _value(self, code: Tensor) -> Tensor:
        return divide(code + self.offset, self.levels / 2)

    def encode(self, q: Tensor) -> Tensor:
        return torch.round(q * (self.levels / 2) - self.offset).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        return self._value(codes.to(torch.float32))

    def values(self) -> list[float]:
        return [(code + self.offset) * 2 / self.levels for code in range(int(self._first), int(self._last) + 1)]
