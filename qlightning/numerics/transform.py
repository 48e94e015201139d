"""Transforms: rewrites of a tensor before it is quantized."""

from abc import ABC, abstractmethod

from torch import Tensor

from qlightning.numerics.layer_part import LayerPart


class Transform(LayerPart, ABC):
    """What a layer does with its input before it is quantized: x (..., features), shape kept."""

    place = "transform"

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The transformed x, of its dtype."""


class Basis(Transform, ABC):
    """A transform that is linear, orthogonal up to a factor, and invertible.

    A quantizer can work in it, `x -> inverse(quantize(forward(x)))`: its gradients then pass through the inverse, which
    for such a map is the adjoint up to that factor.
    """

    @abstractmethod
    def inverse(self, x: Tensor) -> Tensor:
        """The inverse of `forward`."""
