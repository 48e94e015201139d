"""ZeroQAT: quantization-aware training with forward passes alone, at the memory of inference."""

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback

from qlightning import solvers
from qlightning.callbacks.forward_only import ForwardOnly
from qlightning.methods.method import Method
from qlightning.numerics import Int, PerToken, Quantizer, granularity_of
from qlightning.optim.zeroth_order import Restore


class ZeroQAT(Method):
    """Min-max weights and inputs, and weights that move along random directions by the difference of two losses.

    No backward pass, no optimizer state, the same batch and no dropout in both passes of a step.

    Paper: End-to-End On-Device Quantization-Aware Training for LLMs at Inference Cost (Tan et al., 2025, arXiv
    2509.00031; its first version is called ZeroQAT).

    Before the first step, scales and shifts of input channels are found and folded into norms and the layers before, so
    that the float function stays and inputs and weights share what is hard to round.

    Deviations: the weights alone are trained, as the authors' code does; the paper moves the scales and shifts, and the
    clipping of weights, along with them. Here scales and shifts learn from the error of each block before the fit
    (`solvers.LET`), and lie from then on in norms and biases, which `parameters` may name; clipping does not learn, and
    the range of weights is that of the beginning. Parameters come back from a copy, bit for bit, which costs as much
    memory as what is trained ("regenerate" is the paper's way). The best checkpoint by the quantized metric is not kept
    by itself: add a ModelCheckpoint. Which parameters the light variant moves is (secondary).

    Args:
        bits: Bits of weights, asymmetric.
        input_bits: Bits of layer inputs, asymmetric and per token; None leaves them in float.
        granularity: What shares a step: "channel" or a group size.
        lr: Learning rate, constant; the authors use 1e-7 to 1e-6.
        eps: Size of the perturbation.
        parameters: Name globs of what is trained; ("*.q_proj.weight", "*.v_proj.weight") is the light variant.
        seed: Of the directions.
        restore: How parameters come back after the two passes, "copy" or "regenerate".
        alpha: How much of the inputs' range the weights take over at first: 0.75 as for OPT, or the two ends of one by
            channel, (0.5, 0.7), as for Llama; None leaves weights as they are.
        let_steps: Steps in which scales and shifts learn, for each block; 0 keeps the first ones.
        batches: Number of batches of calibration data for them.
    """

    backward = False

    def __init__(
        self,
        bits: int = 4,
        *,
        input_bits: int | None = 8,
        granularity: Literal["channel"] | int = "channel",
        lr: float = 1e-6,
        eps: float = 1e-3,
        parameters: Sequence[str] = ("*weight",),
        seed: int = 0,
        restore: Restore = "copy",
        alpha: float | tuple[float, float] | None = 0.75,
        let_steps: int = 64,
        batches: int = 16,
    ) -> None:
        self.bits, self.input_bits, self.granularity = bits, input_bits, granularity
        self.lr, self.eps, self.parameters = lr, eps, tuple(parameters)
        self.seed, self.restore = seed, restore
        self.alpha, self.let_steps, self.batches = alpha, let_steps, batches
        self.quantization()
        self.extras()

    def quantization(self) -> dict[str, Any]:
        rows = granularity_of(self.granularity)
        placed: dict[str, Any] = {"weight": Quantizer(Int(self.bits, symmetric=False), rows)}
        if self.input_bits is not None:
            placed["input"] = Quantizer(Int(self.input_bits, symmetric=False), PerToken())
        if self.alpha is not None:
            placed["init"] = solvers.LET(alpha=self.alpha, steps=self.let_steps, batches=self.batches, seed=self.seed)
        return placed

    def extras(self) -> list[Callback]:
        options: dict[str, Any] = {"parameters": self.parameters, "seed": self.seed, "restore": self.restore}
        return [ForwardOnly(self.lr, self.eps, **options)]
