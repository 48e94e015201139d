"""The grid of a quantizer, entry by entry: what solvers that go through a weight column by column round to."""

from collections.abc import Callable

import torch
from torch import Tensor

from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.transform import Basis


class Lattice:
    """The values that `quantizer` can give each entry of a weight, its scales held as they are for this weight.

    Where the quantizer works in a basis of its own, so does the lattice: solve for `weight` with `hessians`, then take
    `values`. Rounding all entries to the nearest is `quantizer(weight)`, bit for bit.

    Args:
        quantizer: With a settled scale.
        weight: (output channels, fan-in).

    Attributes:
        weight: float32, the weight in the quantizer's basis.

    Raises:
        ValueError: It is not a plain quantizer but a composite.
    """

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        if not isinstance(quantizer, Quantizer):
            raise ValueError(
                f"{quantizer!r} does not round a weight entry by entry, as this solver does: calibrate with a plain "
                "quantizer, for example weight='int4-g128'"
            )
        grid, granularity = quantizer.grid(weight), quantizer.granularity
        self.basis = quantizer.transform
        self.weight = weight.float() if self.basis is None else self.basis(weight.float())
        self.format, shape = quantizer.format, granularity.view(self.weight).shape

        def spread(blocks: Tensor) -> Tensor:
            return granularity.unview(blocks.detach().expand(shape).contiguous(), weight.shape)

        self.step, self.divisor = spread(grid.step), spread(grid.divisor)
        self.zero = None if grid.zero_point is None else spread(grid.zero_point)

    def hessians(self, hessians: Tensor) -> Tensor:
        """(g, d, d) second moments of inputs, in the quantizer's basis."""
        if self.basis is None:
            return hessians
        if len(hessians) > 1 and hasattr(self.basis, "columns"):
            raise ValueError(
                f"{self.basis!r} mixes output channels, which in a grouped convolution have different inputs: leave "
                "such layers in float or give them a quantizer without it, rules={'<name>': 'int4'}"
            )
        return torch.stack([in_basis(self.basis, hessian) for hessian in hessians])

    def values(self, rounded: Tensor) -> Tensor:
        """float32 (output channels, fan-in): representable values as values of the weight."""
        return rounded if self.basis is None else self.basis.inverse(rounded)

    def nearest(
        self, v: Tensor, rows: slice, columns: Tensor | slice, rounding: Callable[[Tensor], Tensor] = torch.round
    ) -> Tensor:
        """The representable values (float32) that are nearest to `v` at some rows and columns, in the basis.

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


def in_basis(basis: Basis, hessian: Tensor) -> Tensor:
    """V H V^T for a basis that maps each row w of a matrix to w V^T.

    One that mixes rows as well says what it does to a single row with a method `columns`.
    """
    turn = getattr(basis, "columns", basis)
    matrix = turn(torch.eye(len(hessian), device=hessian.device)).to(hessian)
    return matrix.t() @ hessian @ matrix
