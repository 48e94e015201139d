"""AWQ as the beginning of quantization-aware training."""

from collections.abc import Sequence
from typing import Any, Literal

from qlightning import solvers
from qlightning.layers.scheme import Scheme
from qlightning.methods.method import Method
from qlightning.numerics import Int, Quantizer, granularity_of


class AWQ(Method):
    """Input channels with large activations get larger weights, whose producers are divided; then training.

    When quantization begins, parameters change and the float function does not: weights become W diag(s), norms and the
    layers before them are divided by s, and outliers of each group of a weight are clipped. Training goes on from
    there, with plain quantizers and nothing left to fold at deployment.

    Paper: AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration (Lin et al., MLSys 2024,
    arXiv 2306.00978).

    Deviations: the paper's result is final, here training goes on from it, on the grid that was settled on the scaled
    weights. What takes a scale, and which layers are queries and keys, is found by trying the block and not by names;
    where nothing takes it (grouped queries, an activation function other than ReLU) weights keep theirs and the
    calibration's report says so. Number and length of sequences are (from memory).

    Args:
        bits: Bits of weights; None where another method determines the weights' quantizer (compose).
        granularity: What shares a scale and zero point: "channel" or a group size.
        grid: Number of alphas that are tried: 0, 1 / grid, ... below 1.
        shrink: Largest share by which a group's range is clipped; 0 for no clipping.
        then: What rounds the scaled weights: the "nearest" value, or "gptq".
        batches: Number of batches of calibration data.
        start: When weights are scaled and quantization begins, as in QATCallback.
    """

    def __init__(
        self,
        bits: int | None = 4,
        *,
        granularity: Literal["channel"] | int = 128,
        grid: int = 20,
        shrink: float = 0.5,
        then: Literal["nearest", "gptq"] = "nearest",
        batches: int = 128,
        start: int | float = 0,
    ) -> None:
        if then not in ("nearest", "gptq"):
            raise ValueError(f"AWQ(then={then!r}): write then='nearest' or then='gptq'")
        self.bits, self.granularity, self.grid, self.shrink = bits, granularity, grid, shrink
        self.then, self.batches, self.start = then, batches, start

    def quantization(self) -> dict[str, Any]:
        rounds = solvers.GPTQ(batches=self.batches) if self.then == "gptq" else None
        init = solvers.AWQ(grid=self.grid, shrink=self.shrink, then=rounds, batches=self.batches)
        if self.bits is None:
            return {"init": init, "start": self.start}
        shared = granularity_of(self.granularity)
        return {"weight": Quantizer(Int(self.bits, symmetric=False), shared), "init": init, "start": self.start}

    def check(self, others: Sequence[Method]) -> None:
        for other in others:
            asked, name = other.quantization(), type(other).__name__
            if "init" in asked:
                raise ValueError(
                    f"AWQ and {name} both find the weights that training starts from: use one of them; for AWQ's "
                    "scales under GPTQ's rounding write AWQ(then='gptq')"
                )
            if any(isinstance(rule, Scheme) and rule.adapter is not None for rule in asked.get("rules", {}).values()):
                raise ValueError(
                    f"{name} has adapters inside the quantizer, which then rounds W + BA, and AWQ would search for W "
                    f"alone: use one of them, Trainer(callbacks={self!r}.callbacks())"
                )
