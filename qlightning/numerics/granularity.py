"""Granularities: which elements share a scale.

Each is a reshape in which the elements that share a scale are the last dimension, so that every other part can be
written once: blocks `(..., n)`, scale `(..., 1)`. A weight arrives as a matrix (rows = output channels, columns =
fan-in), an activation as `(..., features)`. Scales of a weight keep its dimension 0 and therefore shard with it.
"""

from abc import ABC, abstractmethod

from torch import Tensor

from qlightning.numerics.part import Part

Shape = tuple[int, ...]


class Granularity(Part, ABC):
    """A reversible view of a tensor as blocks that share a scale."""

    needs_fixed_rows: bool = False
    """True when it only makes sense for weights, whose rows are always the same."""

    needs_tokens: bool = False
    """True when it only makes sense for activations."""

    shared_rows: int | None = None
    """How many neighbouring rows of a matrix share scales; None when all do."""

    @abstractmethod
    def view(self, x: Tensor) -> Tensor:
        """`x` as blocks of shape (..., elements per scale)."""

    @abstractmethod
    def unview(self, blocks: Tensor, shape: Shape) -> Tensor:
        """The inverse of `view` for a tensor of that shape."""

    @abstractmethod
    def scale_shape(self, shape: Shape) -> Shape:
        """Shape of the scales of a tensor of that shape.

        Raises:
            ValueError: The shape cannot be divided this way; the message names what can.
        """


class PerTensor(Granularity):
    """One scale for everything: (1, numel) -> (1, 1)."""

    def view(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1)

    def unview(self, blocks: Tensor, shape: Shape) -> Tensor:
        return blocks.reshape(shape)

    def scale_shape(self, shape: Shape) -> Shape:
        return (1, 1)


class PerChannel(Granularity):
    """One scale per output channel of a weight: (rows, columns) -> (rows, 1)."""

    needs_fixed_rows = True
    shared_rows = 1

    def view(self, x: Tensor) -> Tensor:
        return x

    def unview(self, blocks: Tensor, shape: Shape) -> Tensor:
        return blocks

    def scale_shape(self, shape: Shape) -> Shape:
        return (*shape[:-1], 1)


class PerToken(Granularity):
    """One scale per token of an activation: (..., features) -> (..., 1)."""

    needs_tokens = True

    def view(self, x: Tensor) -> Tensor:
        return x

    def unview(self, blocks: Tensor, shape: Shape) -> Tensor:
        return blocks

    def scale_shape(self, shape: Shape) -> Shape:
        return (*shape[:-1], 1)


class PerGroup(Granularity):
    """One scale per `size` neighbouring columns: (..., columns) -> (..., columns / size, 1).

    Args:
        size: Elements per group; must divide the last dimension.
    """

    shared_rows = 1

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"PerGroup({size}): a group has at least one element, for example PerGroup(128)")
        self.size = size

    def view(self, x: Tensor) -> Tensor:
        return x.reshape(*self.scale_shape(x.shape)[:-1], self.size)

    def unview(self, blocks: Tensor, shape: Shape) -> Tensor:
        return blocks.reshape(shape)

    def scale_shape(self, shape: Shape) -> Shape:
        columns = shape[-1]
        if columns >= 0 and columns % self.size:
            usual = [size for size in (16, 32, 64, 128, 256) if columns % size == 0]
            largest = next(size for size in range(min(self.size, columns), 0, -1) if columns % size == 0)
            sizes = " or ".join(f"'g{size}'" for size in usual or [largest])
            raise ValueError(
                f"group size {self.size} does not divide {columns} columns (shape {tuple(shape)}): {sizes} would; "
                "'channel' always does"
            )
        return (*shape[:-1], columns // self.size, 1)


class PerBlock(Granularity):
    """One scale per tile of `rows` x `columns`: (R, C) -> (R / rows, C / columns, 1).

    Args:
        rows: Tile height; must divide the rows.
        columns: Tile width; must divide the columns.
    """

    needs_fixed_rows = True

    def __init__(self, rows: int, columns: int) -> None:
        if rows < 1 or columns < 1:
            raise ValueError(f"PerBlock({rows}, {columns}): a tile has positive sides, for example PerBlock(16, 16)")
        self.rows, self.columns = rows, columns
        self.shared_rows = rows

    def view(self, x: Tensor) -> Tensor:
        down, across, _ = self.scale_shape(x.shape)
        tiles = x.reshape(down, self.rows, across, self.columns)
        return tiles.transpose(1, 2).reshape(down, across, self.rows * self.columns)

    def unview(self, blocks: Tensor, shape: Shape) -> Tensor:
        tiles = blocks.reshape(blocks.shape[0], blocks.shape[1], self.rows, self.columns)
        return tiles.transpose(1, 2).reshape(shape)

    def scale_shape(self, shape: Shape) -> Shape:
        if len(shape) != 2 or shape[0] % self.rows or shape[1] % self.columns:
            raise ValueError(
                f"blocks of {self.rows}x{self.columns} do not tile shape {tuple(shape)}: choose sides that divide it, "
                "or 'channel', which always fits"
            )
        return (shape[0] // self.rows, shape[1] // self.columns, 1)


def granularity_of(shared: str | int) -> Granularity:
    """What shares a scale, as methods are told it.

    >>> granularity_of("channel"), granularity_of(128)
    (PerChannel(), PerGroup(128))

    Args:
        shared: "tensor", "channel", or the size of a group.
    """
    if isinstance(shared, int):
        return PerGroup(shared)
    return {"tensor": PerTensor(), "channel": PerChannel()}[shared]
