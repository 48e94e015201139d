"""16 -> 1.58: train in 16 bits first, switch to ternary weights in mid-run."""

from typing import Any, Literal

from qlightning.callbacks.phase import Phase
from qlightning.methods.bitnet_reloaded import Measure, Norm, bit_linear
from qlightning.methods.method import Method


class ContinualTernary(Method):
    """Float training that becomes ternary at one step, at once or over a ramp, with or without optimizer state.

    From the switch on, weights and inputs are those of `BitNetReloaded`; during a ramp training sees
    w + strength * (Q(w) - w), and inputs likewise. Parameters stay the same objects, the learning rate schedule goes
    on. Evaluation runs at full strength from the switch on.

    Paper: Continual Quantization-Aware Pre-Training: When to transition from 16-bit to 1.58-bit pre-training for BitNet
    language models? (Nielsen, Schneider-Kamp and Galke, Findings of ACL 2025, arXiv 2502.11895).

    Deviations: the share of 20 % in 16 bits is (secondary), not verified in the paper. The norm inside layers acts from
    the first step, so that the switch does not change the function by it.

    Args:
        start: When training becomes ternary: an optimizer step (int) or a share of the run (float).
        ramp: Steps, or share of the run, over which the strength grows to full; 0 for at once.
        optimizer: Whether optimizers "keep" or "reset" their moments and step counts at the switch.
        measure: The scale of a weight, "mean" or "median" of its magnitudes.
        input_bits: Bits of layer inputs; None leaves them in float.
        largest: What the largest magnitude of a token becomes in 8 bits, 127 or 128; see `BitNetReloaded`.
        norm: What stands before the input's quantizer: "layer", "rms" or "none" (a model trained without one).
    """

    def __init__(
        self,
        *,
        start: int | float = 0.2,
        ramp: int | float = 0,
        optimizer: Literal["keep", "reset"] = "keep",
        measure: Measure = "mean",
        input_bits: int | None = 8,
        largest: Literal[127, 128] = 128,
        norm: Norm = "layer",
    ) -> None:
        self.start, self.ramp, self.optimizer = start, ramp, optimizer
        self.measure, self.input_bits, self.largest, self.norm = measure, input_bits, largest, norm

    def quantization(self) -> dict[str, Any]:
        layer = bit_linear(self.measure, input_bits=self.input_bits, largest=self.largest, norm=self.norm)
        switch = Phase(self.start, quantize="all", ramp=self.ramp, optimizer=self.optimizer)
        return {"rules": {"*": layer}, "schedule": [switch]}
