"""CAGE: the optimizer pulls weights toward the quantization grid, more and more toward the end of the run.

CAGE (Tabesh, Safaryan, Panferov, Volkova, Alistarh; MLSys 2026, arXiv 2510.18784); options and defaults from its
README, update rule from secondary sources. With e_t = x_t - Q(x_t), before the step and on the forward pass's grid:

    decoupled   x <- (the optimizer's step from x_t) - lr * strength_t * e_t
    coupled     the optimizer is given  gradient + strength_t * e_t

Adam divides by sqrt(v), roughly the diagonal curvature: e_t added after that division weighs as much as the curvature
times e_t before it. Learned scales are not moved: e_t is the distance of the weight from the grid as it is.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from qlightning.optim.weights import Weight, learning_rates

Ramp = Literal["linear", "none"]
Mode = Literal["decoupled", "coupled"]


def pull_strength(step: int, total: float, *, strength: float, silence: float, ramp: Ramp = "linear") -> float:
    """The strength at a step: 0 during the silence, then a straight line to `strength` at the last step of the run.

    >>> [round(pull_strength(t, 10, strength=10.0, silence=0.8), 6) for t in (0, 7, 8, 9)]
    [0.0, 0.0, 5.0, 10.0]

    Args:
        step: The step about to be taken, 0-based.
        total: Length of the run in steps.
        strength: The pull at the end of the run.
        silence: Share of the run without a pull.
        ramp: "linear", or "none" for the full strength as soon as the silence ends.
    """
    progress = (step + 1) / total
    if progress <= silence:
        return 0.0
    return strength * (progress - silence) / (1 - silence) if ramp == "linear" else strength


class Cage:
    """The pull, around the steps of any optimizer.

    Call `before` when the gradients are there and nothing has moved yet, and `after` when the optimizer has stepped.

    Args:
        mode: "decoupled" from the optimizer's own step and its memory, or "coupled" through the gradient.
    """

    def __init__(self, mode: Mode = "decoupled") -> None:
        if mode not in ("decoupled", "coupled"):
            raise ValueError(f"mode={mode!r}: write mode='decoupled' or mode='coupled'")
        self.mode = mode
        self._kept: list[tuple[Weight, Tensor]] = []

    @torch.no_grad()
    def before(self, optimizer: Optimizer, weights: Iterable[Weight], *, strength: float) -> None:
        """Measure e_t, and add it to the gradients where that is the mode.

        Args:
            optimizer: What is about to step.
            weights: Quantized weights; those that this optimizer does not move or that have no gradient stay alone.
            strength: strength_t; at 0 nothing happens at all.

        Raises:
            ValueError: Learning rate times strength is 1 or more, which would throw weights over their grid points.
        """
        self._kept.clear()
        if not strength:
            return
        rates = learning_rates(optimizer)
        for weight in weights:
            p, rate = weight.parameter, rates.get(id(weight.parameter))
            if rate is None or p.grad is None:
                continue
            if rate * strength >= 1:
                raise ValueError(
                    f"{weight.name}: learning rate {rate:.3g} times strength {strength:.3g} is {rate * strength:.3g}, "
                    f"which moves a weight past its grid point: write strength={0.1 / rate:.2g} or less"
                )
            error = weight.like_parameter(weight.matrix() - weight.quantized()) * strength
            if self.mode == "coupled":
                p.grad += error
            else:
                self._kept.append((weight, error))

    @torch.no_grad()
    def after(self, optimizer: Optimizer) -> None:
        """Pull by what was measured, where the mode is decoupled."""
        rates = learning_rates(optimizer)
        for weight, error in self._kept:
            if (rate := rates.get(id(weight.parameter))) is not None:
                weight.parameter.sub_(error, alpha=rate)
        self._kept.clear()
