"""Codebooks: any sorted table of values as a format, and the tables with names."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlightning.numerics.formats import Format, Round


class Levels(Format):
    """The values of a table; the code is the index.

    >>> Levels([-1.0, 0.0, 0.25, 1.0]).snap(torch.tensor([-3.0, 0.1, 0.2]), torch.round)
    tensor([-1.0000,  0.0000,  0.2500])

    Args:
        table: 2 to 256 strictly ascending values.
    """

    code_dtype = torch.uint8

    def __init__(self, table: Sequence[float]) -> None:
        self.table = tuple(float(value) for value in table)
        if not 2 <= len(self.table) <= 256 or any(a >= b for a, b in zip(self.table, self.table[1:], strict=False)):
            raise ValueError("Levels takes 2 to 256 strictly ascending values, for example Levels([-1, 0, 1])")
        self.bits = (len(self.table) - 1).bit_length()
        self.low, self.high = self.table[0], self.table[-1]
        self.bound = max(-self.low, self.high)

    def snap(self, v: Tensor, rounding: Round) -> Tensor:
        table = torch.tensor(self.table, dtype=torch.float32, device=v.device)
        clipped = v.clamp(self.low, self.high)
        below = (torch.bucketize(clipped, table, right=True) - 1).clamp_(0, len(self.table) - 2)
        fraction = (clipped - table[below]) / (table[below + 1] - table[below])
        index = (below + rounding(fraction)).nan_to_num_(0.0).long()
        return torch.where(v.isnan(), v, table[index])

    def encode(self, q: Tensor) -> Tensor:
        index = torch.bucketize(q, torch.tensor(self.table, dtype=torch.float32, device=q.device))
        return index.clamp_(max=len(self.table) - 1).to(torch.uint8)  # NaN sorts last and must not leave the table

    def decode(self, codes: Tensor) -> Tensor:
        return torch.tensor(self.table, dtype=torch.float32, device=codes.device)[codes.long()]

    def values(self) -> list[float]:
        return list(self.table)


NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""NormalFloat4 of QLoRA (Dettmers et al. 2023, arXiv 2305.14314), the table bitsandbytes ships."""


def log_levels(bits: int, base: float = 2.0) -> Levels:
    """Zero and +-base^-k for k = 0 .. 2^(bits-1) - 2: a logarithmic grid with largest value 1.

    >>> log_levels(3).table
    (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)

    Args:
        bits: 2 to 8.
        base: Ratio of neighbouring levels, above 1.
    """
    if not 2 <= bits <= 8 or base <= 1:
        raise ValueError(f"log_levels(bits={bits}, base={base}): 2 to 8 bits, a base above 1")
    positive = [base**-k for k in range(2 ** (bits - 1) - 1)]
    return Levels([-value for value in positive] + [0.0] + positive[::-1])
