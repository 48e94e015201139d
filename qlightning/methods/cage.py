"""CAGE: the optimizer pulls weights toward the grid, in the last part of the run and more and more."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback

from qlightning.callbacks.cage import CAGECallback
from qlightning.methods.method import Method
from qlightning.numerics import AbsMean, ClippedSTE, Format, Granularity, Int, PerChannel, PerToken, Quantizer
from qlightning.optim.cage import Mode, Ramp
from qlightning.transforms.hadamard import Hadamard


class CAGE(Method):
    """Rotated weights and inputs of few bits, and a pull of the weights toward their grid beside the optimizer.

    After the optimizer's step x <- x - lr * strength_t * (x_t - Q(x_t)), with strength_t a straight line from the end
    of the silence to the end of the run. After Adam's division by sqrt(v) this weighs as the curvature does.

    Paper: CAGE: Curvature-Aware Gradient Estimation For Accurate Quantization-Aware Training (Tabesh, Safaryan,
    Panferov, Volkova and Alistarh, MLSys 2026, arXiv 2510.18784).

    Deviations: the update rule is from secondary sources, options and defaults from the authors' README. Their
    quantizer (QuEST) is rebuilt from memory: Hadamard rotation, the step that fits a Gaussian best, and no gradient for
    what saturates, where QuEST stops it by the size of the error. Learned scales are not pulled.

    Args:
        bits: Bits of weights; None leaves quantization, of inputs too, to a method it is composed with.
        input_bits: Bits of layer inputs; None leaves them in float.
        strength: The pull at the end of the run; its product with the learning rate must stay below 1.
        silence: Share of the run without a pull.
        ramp: "linear" after the silence, or "none" for the full strength at once.
        mode: "decoupled" from the optimizer, or "coupled" through its gradient.
    """

    def __init__(
        self,
        bits: int | None = 4,
        *,
        input_bits: int | None = 4,
        strength: float = 10.0,
        silence: float = 0.8,
        ramp: Ramp = "linear",
        mode: Mode = "decoupled",
    ) -> None:
        self.bits, self.input_bits = bits, input_bits
        self.strength, self.silence, self.ramp, self.mode = strength, silence, ramp, mode
        self.extras()

    def quantization(self) -> dict[str, Any]:
        if self.bits is None:
            return {}
        placed: dict[str, Any] = {"weight": _rotated(self.bits, PerChannel())}
        if self.input_bits is not None:
            placed["input"] = _rotated(self.input_bits, PerToken())
        return placed

    def extras(self) -> list[Callback]:
        return [CAGECallback(self.strength, self.silence, ramp=self.ramp, mode=self.mode)]


def _rotated(bits: int, shared: Granularity) -> Quantizer:
    format = Int(bits)
    scale = AbsMean(multiplier=gaussian_step(format) / math.sqrt(2 / math.pi))  # E |x| of a standard Gaussian
    return Quantizer(format, shared, scale=scale, gradient=ClippedSTE(), transform=Hadamard())


def gaussian_step(format: Format) -> float:
    """The step, in standard deviations, with the smallest mean squared error of a Gaussian on a format's grid.

    >>> round(gaussian_step(Int(2)), 2), round(gaussian_step(Int(4)), 2)
    (1.04, 0.34)
    """
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)
    steps = torch.linspace(0.1, 1.2, 221, dtype=torch.float64) * 6 / format.bound
    errors = [
        float((density * ((format.snap((x / step).float(), torch.round).double() * step - x).square())).sum())
        for step in steps
    ]
    return float(steps[errors.index(min(errors))])
