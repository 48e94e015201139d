"""Frozen weights in one byte each: fixed-point numbers in units of the step that their quantizer began with."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlightning.numerics.scales import Grid
from qlightning.numerics.tensor_quantizer import TensorQuantizer


class FixedPoint(nn.Module):
    """weight = (number - zero point) * step, with a step per block that stays what it was.

    Args:
        layer: A converted layer with a weight quantizer of an integer format.
        kind: "fixed": 8 bits, of which at a format of b bits 8 - b are fraction (numbers are rounded to 2^-(8 - b) and
            cut to the format's range). "codes": the quantizer's own codes.

    Raises:
        ValueError: The quantizer's codes are not integers of at most 8 bits.
    """

    step: Tensor
    zero: Tensor | None

    def __init__(self, layer: Any, kind: Literal["fixed", "codes"]) -> None:
        super().__init__()
        quantizer = layer.quantizer("weight")
        format = quantizer.format
        if format.code_dtype != torch.int8 or format.values() != list(range(int(format.low), int(format.high) + 1)):
            raise ValueError(
                f"a weight kept in one byte needs a quantizer of integers of 2 to 8 bits, not {quantizer!r}: write for "
                "example weight='int4-channel-learned', or LoRA(base='float')"
            )
        self.fraction = 2.0 ** (8 - format.bits) if kind == "fixed" else 1.0
        self.format, self.granularity = format, quantizer.granularity
        matrix = layer.weights()["weight"]
        shape = quantizer.granularity.scale_shape(tuple(matrix.shape))
        options: dict[str, Any] = {"dtype": torch.float32, "device": matrix.device}
        self.register_buffer("step", torch.ones(shape, **options))
        self.register_buffer("zero", None if format.symmetric else torch.zeros(shape, **options))

    @torch.no_grad()
    def take_step(self, quantizer: TensorQuantizer, matrix: Tensor) -> None:
        """Fix the step, and zero point, in which `quantizer` rounds `matrix` now."""
        grid = Grid(*quantizer.grid(matrix))
        self.step.copy_(grid.divisor)
        if self.zero is not None and grid.zero_point is not None:
            self.zero.copy_(grid.zero_point)

    def encode(self, matrix: Tensor) -> Tensor:
        """int8 numbers of a float matrix."""
        v = self.granularity.view(matrix).float() / self.step
        v = v if self.zero is None else v + self.zero
        numbers = (v.clamp(self.format.low, self.format.high) * self.fraction).round()
        return self.granularity.unview(numbers.to(torch.int8), matrix.shape)

    def decode(self, numbers: Tensor) -> Tensor:
        """float32 matrix of int8 numbers."""
        v = self.granularity.view(numbers).float() / self.fraction
        v = v if self.zero is None else v - self.zero
        return self.granularity.unview(v * self.step, numbers.shape)

    def times_step(self, matrix: Tensor) -> Tensor:
        """A matrix that counts steps, in units of the weight (and as well the other way round, for gradients)."""
        return self.granularity.unview(self.granularity.view(matrix.float()) * self.step, matrix.shape)
