"""ZeroQAT: quantization-aware training with forward passes alone, at the memory of inference."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback

from qlightning.callbacks.forward_only import ForwardOnly
from qlightning.methods.method import Method
from qlightning.numerics import Granularity, Int, PerChannel, PerGroup, PerToken, Quantizer
from qlightning.optim.zeroth_order import Restore


class ZeroQAT(Method):
    """Min-max weights and inputs, and weights that move along random directions by the difference of two losses.

    No backward pass, no optimizer state, the same batch and no dropout in both passes of a step.

    Paper: End-to-End On-Device Quantization-Aware Training for LLMs at Inference Cost (Tan et al., 2025, arXiv
    2509.00031; its first version is called ZeroQAT).

    Deviations: the weights alone are trained, as the authors' code does; the paper also moves the smoothing of inputs
    and the clipping of weights, and begins from smoothed weights: compose with a method that smooths. Parameters come
    back from a copy, bit for bit, which costs as much memory as what is trained ("regenerate" is the paper's way). The
    best checkpoint by the quantized metric is not kept by itself: add a ModelCheckpoint. Which parameters the light
    variant moves is (secondary).

    Args:
        bits: Bits of weights, asymmetric.
        input_bits: Bits of layer inputs, asymmetric and per token; None leaves them in float.
        group: Weights that share a step; a whole output channel when not given.
        lr: Learning rate, constant; the authors use 1e-7 to 1e-6.
        eps: Size of the perturbation.
        parameters: Name globs of what is trained; ("*.q_proj.weight", "*.v_proj.weight") is the light variant.
        seed: Of the directions.
        restore: How parameters come back after the two passes, "copy" or "regenerate".
    """

    backward = False

    def __init__(
        self,
        bits: int = 4,
        *,
        input_bits: int | None = 8,
        group: int | None = None,
        lr: float = 1e-6,
        eps: float = 1e-3,
        parameters: Sequence[str] = ("*weight",),
        seed: int = 0,
        restore: Restore = "copy",
    ) -> None:
        self.bits, self.input_bits, self.group = bits, input_bits, group
        self.lr, self.eps, self.parameters = lr, eps, tuple(parameters)
        self.seed, self.restore = seed, restore
        self.extras()

    def quantization(self) -> dict[str, Any]:
        rows: Granularity = PerChannel() if self.group is None else PerGroup(self.group)
        placed: dict[str, Any] = {"weight": Quantizer(Int(self.bits, symmetric=False), rows)}
        if self.input_bits is not None:
            placed["input"] = Quantizer(Int(self.input_bits, symmetric=False), PerToken())
        return placed

    def extras(self) -> list[Callback]:
        options: dict[str, Any] = {"parameters": self.parameters, "seed": self.seed, "restore": self.restore}
        return [ForwardOnly(self.lr, self.eps, **options)]
