"""What a layer computes of its input and weight: a bilinear operation with its adjoints, for `contraction.py`."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Operation(ABC):
    """A bilinear operation `(x, w) -> y` with its two adjoints, and the views in which quantizers see x and w."""

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as (output channels, fan-in)."""

    @abstractmethod
    def unmatrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """The inverse of `matrix`, in the shape of `weight`."""

    @abstractmethod
    def features_last(self, x: Tensor) -> Tensor:
        """The input as (..., features)."""

    @abstractmethod
    def features_back(self, x: Tensor) -> Tensor:
        """The inverse of `features_last`."""

    @abstractmethod
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """op(x, w) + b."""

    @abstractmethod
    def grad_input(self, grad: Tensor, x_shape: torch.Size, weight: Tensor) -> Tensor:
        """Gradient with respect to x."""

    @abstractmethod
    def grad_weight(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient with respect to the weight; `weight` is given for its shape."""

    @abstractmethod
    def grad_bias(self, grad: Tensor) -> Tensor:
        """Gradient with respect to the bias."""
