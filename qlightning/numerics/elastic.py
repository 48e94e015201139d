"""The gradients of ParetoQ (Liu et al., NeurIPS 2025, arXiv 2502.02631), and a count over the whole tensor.

Both part from the chain rule where a value saturates or has only two levels, so that the scale stays elastic there.
"""

from typing import Literal

import torch
from torch import Tensor

from qlightning.numerics.formats import Format
from qlightning.numerics.gradients import Gradient


class ElasticBinary(Gradient):
    """Elastic binarization: slope 1 where |v| <= 1, and the scale learns from sign(v) of every value.

    As in BiT (Liu et al. 2022, arXiv 2205.13016); damped like LSQ.
    """

    def slope(self, v: Tensor, q: Tensor, format: Format) -> Tensor:
        return (v.abs() <= 1).to(v.dtype)

    def scale_factor(self, elements: int, format: Format) -> float:
        return (elements * max(format.high, 1.0)) ** -0.5

    def scale_gradient(self, grad: Tensor, v: Tensor, q: Tensor, slope: Tensor, format: Format) -> Tensor:
        return (grad * q).sum(-1, keepdim=True) * self.scale_factor(grad.shape[-1], format)


class StretchedElastic(Gradient):
    """Stretched elastic quantization (SEQ): slope 1 where |v| <= edge; the scale learns q - v there, else +-beyond.

    Args:
        edge: Where values saturate, in units of the scale.
        beyond: dq/dscale of a value that saturates: "level" for the outermost level, which is what it becomes; a number
            replaces it. The authors' code has 1.0 for the ternary grid, whose outermost level is 2/3.
    """

    def __init__(self, *, edge: float = 0.99, beyond: Literal["level"] | float = "level") -> None:
        if not edge > 0 or not (beyond == "level" or (isinstance(beyond, int | float) and beyond > 0)):
            raise ValueError(
                f"StretchedElastic(edge={edge!r}, beyond={beyond!r}): a positive edge, and beyond='level' or a "
                "positive number"
            )
        self.edge, self.beyond = edge, beyond

    def slope(self, v: Tensor, q: Tensor, format: Format) -> Tensor:
        return (v.abs() <= self.edge).to(v.dtype)

    def scale_factor(self, elements: int, format: Format) -> float:
        return (elements * max(format.high, 1.0)) ** -0.5

    def scale_gradient(self, grad: Tensor, v: Tensor, q: Tensor, slope: Tensor, format: Format) -> Tensor:
        outermost = format.high if self.beyond == "level" else float(self.beyond)
        moved = torch.where(v.abs() <= self.edge, q - slope * v, v.sign() * outermost)
        return (grad * moved).sum(-1, keepdim=True) * self.scale_factor(grad.shape[-1], format)


class OverTensor(Gradient):
    """As another gradient, but the scale's is damped by the elements of the whole tensor, not of one scale.

    Args:
        gradient: The other gradient, one that is damped by 1 / sqrt(elements).
    """

    def __init__(self, gradient: Gradient) -> None:
        self.gradient = gradient
        self.identity = gradient.identity

    def slope(self, v: Tensor, q: Tensor, format: Format) -> Tensor:
        return self.gradient.slope(v, q, format)

    def scale_factor(self, elements: int, format: Format) -> float:
        return self.gradient.scale_factor(elements, format)

    def scale_gradient(self, grad: Tensor, v: Tensor, q: Tensor, slope: Tensor, format: Format) -> Tensor:
        scales = grad.numel() // grad.shape[-1]
        return self.gradient.scale_gradient(grad, v, q, slope, format) * scales**-0.5
