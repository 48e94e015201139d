"""Statistics of a weight that is spread over ranks: what each knows of its rows, reduced."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qlightning.numerics.statistics import Pool


class OverRanks(Pool):
    """The values of one block are spread over the ranks of a group, all of which ask for the same at the same time.

    Args:
        group: The ranks.
        elements: Number of all values.
    """

    def __init__(self, group: Any, elements: int) -> None:
        self.group, self.elements = group, elements

    def count(self, here: int) -> int:
        return self.elements

    def maximum(self, x: Tensor) -> Tensor:
        x = x.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def total(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, dist.ReduceOp.SUM, group=self.group)
        return x

    def smallest(self, x: Tensor, rank: int) -> Tensor:
        """By its bits, whose order is that of the values, eight at a time: 2 KiB on the wire each."""
        assert x.dtype == torch.float32
        bits = x.flatten().view(torch.int32)
        found, left = bits.new_zeros((), dtype=torch.int64), bits.new_full((), rank, dtype=torch.int64)
        for shift in (24, 16, 8, 0):
            digits = ((bits >> shift) & 0xFF).to(torch.int64)
            taking_part = (bits >> shift >> 8) == found
            counts = self.total(digits.new_zeros(256).scatter_add_(0, digits, taking_part.to(torch.int64)))
            up_to = counts.cumsum(0)
            digit = (up_to < left).sum()
            left = left - up_to[digit] + counts[digit]
            found = found * 256 + digit
        return found.to(torch.int32).view(torch.float32).view(1, 1)
