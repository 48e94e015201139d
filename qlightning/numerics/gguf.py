"""The grids of GGUF, the file format of llama.cpp: blocks of 32 with float16 scales, chosen as its own quantizer does.

ggml rounds values in the float32 step and stores the step in float16, so that codes do not depend on the rounding of
the step (`Grid.inner`). The formulas are those of the Python package `gguf` (`gguf.quants`); it multiplies by 1 / step
where this divides, so a value within float32 error of a tie may go the other way there.
"""

import torch
from torch import Tensor

from qlightning.numerics.compiled import rounded
from qlightning.numerics.formats import Format
from qlightning.numerics.rounding import Rounding
from qlightning.numerics.scales import Grid, Measured, Scale, Ship, zero_point
from qlightning.numerics.statistics import absmax, divide, extremes

_SMALLEST = 2.0**-24
"""The smallest positive float16."""


class HalfAway(Rounding):
    """To the nearest integer, ties away from zero, as C's `roundf`.

    >>> HalfAway().round(torch.tensor([-1.5, -0.4, 0.5, 2.5]), None)
    tensor([-2., -0.,  1.,  3.])
    """

    ties = "away"

    def key(self) -> Tensor | None:
        return None

    def round(self, position: Tensor, key: Tensor | None) -> Tensor:
        magnitude = position.abs()
        below = torch.floor(magnitude)
        return (below + (magnitude - below >= 0.5)).copysign(position)


class SignedExtreme(Scale):
    """The value of largest magnitude, with its sign, becomes the lowest code: step = extreme / low (Q4_0).

    The step is negative where the extreme is positive. The first of several extremes counts.
    """

    ships_as = torch.float16

    def forward(self, blocks: Tensor, format: Format, ship: Ship) -> Grid:
        with torch.no_grad():
            where = blocks.detach().abs().argmax(-1, keepdim=True)
            return _half(divide(blocks.detach().gather(-1, where).float(), format.low))


class StoredHalf(Scale):
    """absmax / bound, stored in float16 after values were rounded in it (Q8_0)."""

    ships_as = torch.float16
    order_free = True

    def forward(self, blocks: Tensor, format: Format, ship: Ship) -> Grid:
        with torch.no_grad():
            return _half(divide(absmax(blocks.detach(), self.pool), format.bound))


class HalfMinimum(Measured):
    """Min-max with a step of 7 significant bits, so that step times zero point is a float16 exactly (Q4_1).

    Q4_1 stores step and minimum in float16 and computes step * code + minimum. With an integer zero point the minimum
    is a multiple of the step up to 15, four bits, and float16 has eleven. ggml's own rule takes any float16 minimum;
    its grid has no exact zero and no zero point, and is not what this trains on.
    """

    ships_as = torch.float16
    offset = True
    order_free = True

    def measure(self, blocks: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
        lowest, highest = extremes(blocks, self.pool)
        lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
        return divide(highest - lowest, format.high - format.low), lowest

    def forward(self, blocks: Tensor, format: Format, ship: Ship) -> Grid:
        with torch.no_grad():
            step, lowest = self.measure(blocks.detach(), format)
            assert lowest is not None
            dropped = (1 << 17) - 1  # of 23 stored bits of the significand, six are kept
            coarse = ((step.view(torch.int32) + dropped) & ~dropped).view(torch.float32)  # up: nothing saturates
            coarse = torch.ceil(coarse / _SMALLEST).clamp(min=1) * _SMALLEST  # subnormal ones are multiples of it
            coarse = rounded(coarse, torch.float16)  # infinite where it overflows, which `Quantizer.quantize` refuses
            return Grid(coarse, zero_point(lowest, coarse, format).clamp_(format.low, format.high))


def _half(step: Tensor) -> Grid:
    """The grid of a float32 step that is stored in float16; a block of zeros has the step 0."""
    return Grid(rounded(step, torch.float16), inner=step.masked_fill(step == 0, 1.0))
