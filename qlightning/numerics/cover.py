"""The step that covers both ends of the values, with zero at code zero."""

import torch
from torch import Tensor

from qlightning.numerics.formats import Format
from qlightning.numerics.scales import Measured
from qlightning.numerics.statistics import divide, extremes


class Cover(Measured):
    """max(|min x / lowest code|, |max x / highest code|): the smallest step at which nothing saturates on either side.

    For an asymmetric format the smallest covered value goes with it, so that code zero means zero.
    """

    offset = None
    order_free = True

    def measure(self, blocks: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
        lowest, highest = extremes(blocks, self.pool)
        step = divide(highest.clamp(min=0), format.high)
        if format.low < 0:
            step = torch.maximum(step, divide(lowest.clamp(max=0), format.low))
        return step, None if format.symmetric else step * format.low
