"""FP4 training: 4-bit weights and inputs, with a gradient that knows the grid and outliers that bypass it."""

from typing import Any, Literal

from qlightning.methods.method import Method
from qlightning.numerics import (
    DGE,
    STE,
    ClampCompensate,
    Float,
    HalfUp,
    Nearest,
    PerChannel,
    PerTensor,
    PerToken,
    Quantizer,
    Rounding,
)
from qlightning.numerics.tensor_quantizer import TensorQuantizer


class FP4Training(Method):
    """W4A4 training in E2M1: weights with a differentiable gradient estimator, inputs with outliers compensated.

    Paper: Optimizing Large Language Model Training Using FP4 Quantization (Wang et al., ICML 2025, arXiv 2501.17116).

    Deviations: the residual of clamped inputs is multiplied with the quantized weight, in the precision of the run, as
    the authors' code does (the paper: a sparse product in a higher format, FP8 or INT8 from memory). Gradients,
    their communication and the optimizer stay what the run makes them (the paper: FP8 gradients and moments as in
    FP8-LM, from memory). The quantiles are elements of the tensor, so that alpha = 1 is exact.
    The estimator lowers the mean slope to 0.594: tune the learning rate anew before comparing it with "ste".

    Args:
        k: Steepness of the estimator's curve.
        clamp: Its largest slope.
        alpha: Quantile at which inputs are clamped; 1 leaves them alone.
        over: What the quantile is taken over.
        residual: What becomes of the part that is clamped off: "exact" adds it back, "none" drops it.
        gradient: Gradient of the weights: "dge", or "ste" to compare with.
        granularity: "vector" is a scale per output channel and token, "tensor" one for each tensor.
        ties: Values in the middle go to the "even" neighbour (hardware), or "up" (the authors' kernel).
        start: When quantization begins, as in QATCallback.
    """

    def __init__(
        self,
        k: float = 5.0,
        clamp: float = 3.0,
        *,
        alpha: float = 0.99,
        over: Literal["tensor", "channel", "token"] = "tensor",
        residual: Literal["exact", "none"] = "exact",
        gradient: Literal["dge", "ste"] = "dge",
        granularity: Literal["vector", "tensor"] = "vector",
        ties: Literal["even", "up"] = "even",
        start: int | float = 0,
    ) -> None:
        self.k, self.clamp = k, clamp
        self.alpha, self.over, self.residual = alpha, over, residual
        self.gradient, self.granularity, self.ties, self.start = gradient, granularity, ties, start

    def quantization(self) -> dict[str, Any]:
        return {"weight": self._weight(), "input": self._input(), "start": self.start}

    def _weight(self) -> Quantizer:
        gradient = {"dge": DGE(k=self.k, clamp=self.clamp), "ste": STE()}[self.gradient]
        shared = {"vector": PerChannel(), "tensor": PerTensor()}[self.granularity]
        return Quantizer(Float(2, 1), shared, gradient=gradient, rounding=self._rounding())

    def _input(self) -> TensorQuantizer:
        shared = {"vector": PerToken(), "tensor": PerTensor()}[self.granularity]
        quantizer = Quantizer(Float(2, 1), shared, rounding=self._rounding())
        if self.alpha == 1:
            return quantizer
        return ClampCompensate(quantizer, alpha=self.alpha, over=self.over, residual=self.residual)

    def _rounding(self) -> Rounding:
        return {"even": Nearest(), "up": HalfUp()}[self.ties]
