"""LR-QAT: a low-rank update inside the rounding of a frozen, down-cast weight."""

from typing import Any, Literal

from qlightning.adapters import LoRA
from qlightning.layers.scheme import Scheme
from qlightning.methods.method import Method
from qlightning.numerics import MSE, ClippedSTE, Int, Learned, Quantizer, granularity_of


class LRQAT(Method):
    """Weight s * clamp(round(phi + alpha / rank * B A)), with phi the frozen weight in steps, one byte each.

    The step s is learned outside the rounding, which sees the step of the start: learning it never flips a code.
    Weights are kept as 8-bit fixed-point numbers in units of that step, of which 8 - bits are fraction; the float
    weight is gone. What deploys is codes and steps, without an adapter.

    Paper: Low-Rank Quantization-Aware Training for LLMs (Bondarenko, Del Chiaro, Nagel, 2024, arXiv 2406.06385).

    Deviations: backward makes the quantized weight again instead of running each layer under activation checkpointing,
    with the same memory. The sum is rounded to the model's dtype before it is quantized, so that a merge, which writes
    it into a weight of that dtype, changes no bit; A and B themselves stay float32. Their names are LoRA's: A is random
    and (rank, fan-in), B starts at zero. What trains beside them is what requires gradients in the model; the paper
    keeps embeddings, head and norms as they are.

    Args:
        bits: Bits of weights, 2 to 4 in the paper.
        granularity: What shares a step: "channel" or a group size.
        rank: Of the update.
        alpha: The update counts alpha / rank times, in steps.
        downcast: How the weight is kept: "fixed" (8-bit fixed-point numbers), "codes" (the paper's integer-only
            variant: its own codes, so that only the update is rounded) or "float" (as it is).
        input_bits: Bits of layer inputs, asymmetric with a range of its own for every token; None: float.
        kv_bits: Likewise of keys and values.
        scale_lr: Learning rate of steps in units of that of A and B; the paper's are 1e-5 and 1e-3.
    """

    def __init__(
        self,
        bits: int = 4,
        *,
        granularity: Literal["channel"] | int = "channel",
        rank: int = 32,
        alpha: float = 1.0,
        downcast: Literal["fixed", "codes", "float"] = "fixed",
        input_bits: int | None = None,
        kv_bits: int | None = None,
        scale_lr: float = 0.01,
    ) -> None:
        self.bits, self.granularity, self.rank, self.alpha = bits, granularity, rank, alpha
        self.downcast, self.input_bits, self.kv_bits, self.scale_lr = downcast, input_bits, kv_bits, scale_lr

    def quantization(self) -> dict[str, Any]:
        adapter = LoRA(self.rank, alpha=self.alpha, base=self.downcast, unit="step")
        scheme = Scheme(
            self._weight(),
            input=None if self.input_bits is None else f"int{self.input_bits}-asym-token",
            kv_cache=None if self.kv_bits is None else f"int{self.kv_bits}-asym-token",
            adapter=adapter,
        )
        return {"rules": {"*": scheme}, "scale_lr": self.scale_lr}

    def _weight(self) -> Quantizer:
        shared = granularity_of(self.granularity)
        # 100 ranges from the largest magnitude down to a hundredth of it
        scale = Learned(MSE(steps=100, floor=0.01, power=4.0), rounding="frozen")
        return Quantizer(Int(self.bits), shared, scale=scale, gradient=ClippedSTE())
