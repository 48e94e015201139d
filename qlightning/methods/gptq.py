"""GPTQ as the beginning of quantization-aware training."""

from typing import Any, Literal

from qlightning import solvers
from qlightning.methods.method import Method
from qlightning.numerics import Int, Quantizer, granularity_of


class GPTQ(Method):
    """Weights rounded column by column, each column making up for the errors of those before it; then trained.

    Paper: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (Frantar et al., ICLR 2023,
    arXiv 2210.17323).

    Deviations: the paper's result is final, here training goes on from it, on the grid on which it was found (the
    scales are fixed by the float weights, also those of groups). A column whose inputs are always zero is rounded, not
    set to zero. For the paper's own result calibrate without training, `qlightning.solvers.calibrate(module, batches,
    qlightning.solvers.GPTQ())`.

    Args:
        bits: Bits of weights; None where another method determines the weights' quantizer (compose).
        granularity: What shares a scale and zero point: "channel" or a group size.
        order: Columns in their "natural" order, or those with the largest inputs first ("activation").
        damping: Added to the Hessian's diagonal, in units of its mean.
        commit: Training starts from the solution's "values", or from these plus what is below a step ("residual").
        batches: Number of batches of calibration data.
        start: When weights are solved and quantization begins, as in QATCallback.
    """

    def __init__(
        self,
        bits: int | None = 4,
        *,
        granularity: Literal["channel"] | int = "channel",
        order: Literal["natural", "activation"] = "natural",
        damping: float = 0.01,
        commit: Literal["values", "residual"] = "values",
        batches: int = 128,
        start: int | float = 0,
    ) -> None:
        self.bits, self.granularity, self.order, self.damping = bits, granularity, order, damping
        self.commit, self.batches, self.start = commit, batches, start

    def quantization(self) -> dict[str, Any]:
        init = solvers.GPTQ(order=self.order, damping=self.damping, commit=self.commit, batches=self.batches)
        if self.bits is None:
            return {"init": init, "start": self.start}
        weight = Quantizer(Int(self.bits, symmetric=False), granularity_of(self.granularity))
        return {"weight": weight, "init": init, "start": self.start}
