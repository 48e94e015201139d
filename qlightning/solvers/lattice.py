"""The grid of a quantizer, entry by entry: what solvers that go through a weight column by column round to."""

from collections.abc import Callable

import torch
from torch import Tensor

from qlightning.numerics.quantizer import Quantizer


class Lattice:
    """The values that `quantizer` can give each entry of a weight, its scales held as they are for this weight.

    Rounding all entries to the nearest is `quantizer(weight)`, bit for bit in float32.

    Args:
        quantizer: With a settled scale.
        weight: (output channels, fan-in).

    Raises:
        ValueError: The quantizer does not round entry by entry (it works in another basis).
    """

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        if not isinstance(quantizer, Quantizer) or getattr(quantizer, "transform", None) is not None:
            raise ValueError(
                f"{quantizer!r} does not round a weight entry by entry, as this solver does: calibrate with a plain "
                "quantizer, for example weight='int4-g128-learned'"
            )
        grid, granularity = quantizer.grid(weight), quantizer.granularity
        self.format, shape = quantizer.format, granularity.view(weight).shape

        def spread(blocks: Tensor) -> Tensor:
            return granularity.unview(blocks.detach().expand(shape).contiguous(), weight.shape)

        self.step, self.divisor = spread(grid.step), spread(grid.divisor)
        self.zero = None if grid.zero_point is None else spread(grid.zero_point)

    def nearest(
        self, v: Tensor, rows: slice, columns: Tensor | slice, rounding: Callable[[Tensor], Tensor] = torch.round
    ) -> Tensor:
        """The values (float32) that are nearest to `v` at some rows and columns of the weight.

        Args:
            v: (rows, columns) wanted.
            rows: Of the weight.
            columns: Of the weight.
            rounding: What rounds between neighbours.
        """
        position = v.float() / self.divisor[rows, columns]
        if self.zero is None:
            return self.format.snap(position, rounding) * self.step[rows, columns]
        zero = self.zero[rows, columns]
        return (self.format.snap(position.add_(zero), rounding) - zero) * self.step[rows, columns]
