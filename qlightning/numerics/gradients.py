"""Gradients: what backward does with the rounding step.

With v = x / scale + zero_point and q = snap(v), the quantizer returns y = scale * (q - zero_point). Rounding has no
useful derivative, so a rule supplies a stand-in `slope` for dq/dv. Everything else is the chain rule:

    dy/dx     = slope
    dy/dscale = (q - zero_point) - slope * x / scale
    dy/dzero  = scale * (slope - 1)
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from qlightning.numerics.formats import Format
from qlightning.numerics.part import Part


class Gradient(Part, ABC):
    """A stand-in for the derivative of rounding."""

    identity: bool = False
    """True when the slope is 1 everywhere: backward to x then needs neither x nor the codes."""

    limit: float | None = None
    """Magnitude of x itself, scale and all, from which on nothing is passed back; None where it does not matter."""

    @abstractmethod
    def slope(self, v: Tensor, q: Tensor, format: Format) -> Tensor:
        """dq/dv, broadcastable to `v` (positions before rounding; `q` after)."""

    @abstractmethod
    def scale_factor(self, elements: int, format: Format) -> float:
        """What the gradient of a learned scale shared by so many elements is multiplied by."""

    def scale_gradient(self, grad: Tensor, v: Tensor, q: Tensor, slope: Tensor, format: Format) -> Tensor:
        """Gradient of a learned scale, (..., 1): the chain rule, where a paper's own is not another.

        Args:
            grad: Gradient of the loss with respect to the blocks' values, float32 (..., elements).
            v: Positions before rounding, less the zero point.
            q: Positions after rounding, less the zero point.
            slope: What of v moves q when the scale does: `slope` above, or 0 where rounding has a step of its own.
            format: What was rounded to.
        """
        factor = self.scale_factor(grad.shape[-1], format)
        return (grad * (q - slope * v)).sum(-1, keepdim=True) * factor


class STE(Gradient):
    """Straight-through: slope 1 everywhere, also for values that saturate (Bengio et al. 2013, arXiv 1308.3432)."""

    identity = True

    def slope(self, v: Tensor, q: Tensor, format: Format) -> Tensor:
        return v.new_ones(())

    def scale_factor(self, elements: int, format: Format) -> float:
        return 1.0


def _inside(v: Tensor, q: Tensor, format: Format, edge: str) -> Tensor:
    v = v if edge == "value" else torch.round(v)
    return ((v >= format.low) & (v <= format.high)).to(v.dtype)


class ClippedSTE(Gradient):
    """Straight-through inside the range, zero where the value saturates.

    Args:
        edge: Where the range ends: "value" at the outermost representable values (the true derivative of clamp), "code"
            half a step beyond them (every v that rounds to an unclamped integer passes, as torch.fake_quantize_* does).
    """

    def __init__(self, *, edge: Literal["value", "code"] = "value") -> None:
        if edge not in ("value", "code"):
            raise ValueError(f"ClippedSTE(edge={edge!r}): write edge='value' or edge='code'")
        self.edge = edge

    def slope(self, v: Tensor, q: Tensor, format: Format) -> Tensor:
        return _inside(v, q, format, self.edge)

    def scale_factor(self, elements: int, format: Format) -> float:
        return 1.0


class LSQ(Gradient):
    """Learned step size: clipped straight-through, with the scale's gradient damped by 1 / sqrt(elements * Qp).

    Learned Step Size Quantization (Esser et al., ICLR 2020, arXiv 1902.08153), eqs. 2 to 5.

    Args:
        factor: "count" for the paper's 1 / sqrt(elements * Qp); a number replaces it (1.0: no damping).
    """

    def __init__(self, *, factor: Literal["count"] | float = "count") -> None:
        if factor != "count" and not (isinstance(factor, int | float) and factor > 0):
            raise ValueError(f"LSQ(factor={factor!r}): write factor='count' or a positive number")
        self.factor = factor

    def slope(self, v: Tensor, q: Tensor, format: Format) -> Tensor:
        return _inside(v, q, format, "value")

    def scale_factor(self, elements: int, format: Format) -> float:
        if self.factor == "count":
            return (elements * max(format.high, 1.0)) ** -0.5
        return float(self.factor)


class NoGradient(Gradient):
    """Slope 0: nothing flows back to x (frozen codes); a learned scale still learns."""

    def slope(self, v: Tensor, q: Tensor, format: Format) -> Tensor:
        return v.new_zeros(())

    def scale_factor(self, elements: int, format: Format) -> float:
        return 1.0
