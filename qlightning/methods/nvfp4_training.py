"""NVFP4 pre-training: 4-bit operands in all three matrix products of a linear layer."""

from typing import Any, Literal

from lightning.pytorch import Callback

from qlightning.callbacks.release import Release
from qlightning.layers.backward import Backward
from qlightning.layers.scheme import Scheme
from qlightning.methods.method import Method
from qlightning.numerics import Float, Granularity, Nearest, PerBlock, PerGroup, Quantizer, Stochastic, TwoLevel
from qlightning.transforms.hadamard import RandomHadamard

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""The signs of Transformer Engine's rotation: one vector for all layers and steps."""


class NVFP4Training(Method):
    """Weights, inputs and gradients in NVFP4, with the four aids of NVIDIA's recipe, each of which can be left out.

    fprop and dgrad share one quantized weight, in tiles of 16 x 16. wgrad's operands are rotated along their tokens.
    Gradients are rounded stochastically, everything else to the nearest. The last blocks stay in float.

    Paper: Pretraining Large Language Models with NVFP4 (NVIDIA 2025, arXiv 2509.25149); constants of Transformer
    Engine's recipe NVFP4BlockScaling.

    Deviations: "blocks in BF16" are blocks in the precision of the run. The two-level scale divides by its step, where
    Transformer Engine multiplies by a reciprocal: single values may round differently. Products are those of decoded
    operands in the precision of the run, which in bfloat16 rounds the operands once more, as the tensor's scale is part
    of them. The tensor's maximum is one process's. Which blocks stay in float is a share for any
    model (the paper names them for each of its own: the first 2 and last 8 of 62, or the last 4). The late switch is
    off by default, as it depends on when the learning rate decays.

    Args:
        last_in_float: Blocks at the end that stay in float: a share of all (float) or a number (int); 0 for none.
        first_in_float: Blocks at the beginning that do.
        weights: "2d" shares scales in tiles of 16 x 16; "1d" in rows of 16 along what is contracted, so that fprop and
            dgrad see different weights.
        gradients: How gradients are rounded: "stochastic" or "nearest".
        rotation: Block of the random Hadamard rotation of wgrad's operands, along tokens; None for none.
        block_scale: How E4M3 scales are rounded: "nearest" (as NVIDIA), or "up", which clips no maximum and thus keeps
            stochastic rounding unbiased.
        release_forward: When the forward pass returns to float, shortly before the learning rate decays: a step or a
            share of the run; None never. The trained model is then a float model.
        start: When quantization begins, as in QATCallback.
    """

    def __init__(
        self,
        last_in_float: int | float = 0.15,
        *,
        first_in_float: int | float = 0,
        weights: Literal["2d", "1d"] = "2d",
        gradients: Literal["stochastic", "nearest"] = "stochastic",
        rotation: int | None = 16,
        block_scale: Literal["nearest", "up"] = "nearest",
        release_forward: int | float | None = None,
        start: int | float = 0,
    ) -> None:
        self.last_in_float, self.first_in_float = last_in_float, first_in_float
        self.weights, self.gradients, self.rotation, self.block_scale = weights, gradients, rotation, block_scale
        self.release_forward, self.start = release_forward, start

    def quantization(self) -> dict[str, Any]:
        rules: dict[str, Any] = {"*": Scheme(self._weight(), input=self._rows(), backward=self._backward())}
        for position, blocks in (("first", self.first_in_float), ("last", self.last_in_float)):
            if blocks:
                rules[f"{position}:{blocks}"] = None
        return {"rules": rules, "start": self.start}

    def extras(self) -> list[Callback]:
        return [] if self.release_forward is None else [Release(["fprop"], at=self.release_forward)]

    def _backward(self) -> Backward:
        return Backward(
            grad_dgrad=self._gradient(),
            weight_dgrad="same" if self.weights == "2d" else self._rows(),
            grad_wgrad=self._gradient(),
            input_wgrad=self._rows(),
            rotation=None if self.rotation is None else self._rotation(self.rotation),
            tokens=max(16, self.rotation or 0),
        )

    def _weight(self) -> Quantizer:
        return self._quantizer(PerBlock(16, 16)) if self.weights == "2d" else self._rows()

    def _rows(self) -> Quantizer:
        return self._quantizer(PerGroup(16))

    def _gradient(self) -> Quantizer:
        return self._quantizer(PerGroup(16), stochastic=self.gradients == "stochastic")

    def _quantizer(self, granularity: Granularity, *, stochastic: bool = False) -> Quantizer:
        rounding = Stochastic() if stochastic else Nearest()
        return Quantizer(Float(2, 1), granularity, scale=TwoLevel(rounding=self.block_scale), rounding=rounding)

    @staticmethod
    def _rotation(block: int) -> RandomHadamard:
        return RandomHadamard(block, signs=SIGNS if block == len(SIGNS) else None)
