"""Transforms: function-preserving rewrites of a tensor before it is quantized."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from qlightning.numerics.part import Part


class Transform(Part, nn.Module, ABC):
    """An invertible linear map of a matrix (rows, columns) or of activations (..., features), shape kept.

    Where a quantizer works in the basis of a transform, gradients pass through its inverse: maps must be orthogonal up
    to a factor, so that inverse and adjoint are the same up to that factor.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)

    __repr__ = Part.__repr__
    __eq__ = Part.__eq__
    __hash__ = nn.Module.__hash__

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x in the new basis, float32 in, float32 out."""

    @abstractmethod
    def inverse(self, x: Tensor) -> Tensor:
        """The inverse of `forward`."""
