"""LLM-QAT: a language model learns its own quantization from itself, with text that it wrote."""

from typing import Any, Literal

from lightning.pytorch import Callback
from torch import Tensor

from qlightning.callbacks.distillation import DistillationCallback
from qlightning.callbacks.teacher import SELF
from qlightning.losses.loss import Reduction
from qlightning.losses.soft import KL
from qlightning.methods.method import Method
from qlightning.numerics import STE, AbsMean, Binary, Int, Levels, PerChannel, PerToken, Quantizer
from qlightning.numerics.formats import Format
from qlightning.numerics.gradients import Gradient


class LLMQAT(Method):
    """Weights, inputs and the key-value cache quantized by their largest magnitude, taught by the float model's logits.

    The loss is the divergence from the float model alone; the task's own is left out. The paper trains on text that
    the float model wrote: `qlightning.data.generated.GeneratedText`.

    Paper: LLM-QAT: Data-Free Quantization Aware Training for Large Language Models (Liu et al., 2023, arXiv
    2305.17888).

    Deviations: scales are the largest magnitude over the largest code without the release's epsilons of 1e-6, so that a
    quantized value is exactly a code times its scale. Gradients pass straight through, as the paper has it; the
    release's backward, which is zero where a magnitude is 2 or more although nothing is clipped there, is
    `gradient="released"`. The loss is the mean over tokens; the release's, per sequence, is `reduction="batch"` and
    grows with the sequence length.

    Args:
        bits: Bits of weights, one scale per output channel: 3 to 8 from the largest magnitude; 2 with values of 0.5 and
            1.5 mean magnitudes; 1 with the mean magnitude (the last two as in the release).
        input_bits: Bits of layer inputs, one scale per token; None leaves them in float.
        kv_bits: Bits of keys and values, one scale per token; None leaves them in float.
        kv_place: Where those are quantized: "projection", as their projections give them, before heads are split and
            keys are rotated (the paper); or "cache", per head after the rotation, as the cache holds them, which is
            what a runtime with a quantized cache computes.
        key_value_layers: Names of the projections of keys and values, for "projection".
        gradient: Of everything that is quantized: "straight-through", or that of the "released" code.
        teacher: "self" for the model when the run begins, or the checkpoint of a float model.
        temperature: Of the softmax of both models.
        reduction: Of the loss over tokens, "tokens" or "batch".
        logits: The submodule whose output is compared; "forward" is the module itself.
        start: When quantization begins, as in QATCallback.
    """

    def __init__(
        self,
        bits: int = 4,
        *,
        input_bits: int | None = 8,
        kv_bits: int | None = 4,
        kv_place: Literal["projection", "cache"] = "projection",
        key_value_layers: tuple[str, ...] = ("k_proj", "v_proj"),
        gradient: Literal["straight-through", "released"] = "straight-through",
        teacher: str = SELF,
        temperature: float = 1.0,
        reduction: Reduction = "tokens",
        logits: str = "forward",
        start: int | float = 0,
    ) -> None:
        if kv_place not in ("projection", "cache"):
            raise ValueError(f"LLMQAT(kv_place={kv_place!r}): write kv_place='projection' or kv_place='cache'")
        if gradient not in ("straight-through", "released"):
            raise ValueError(f"LLMQAT(gradient={gradient!r}): write gradient='straight-through' or 'released'")
        for name, value in (("input_bits", input_bits), ("kv_bits", kv_bits)):
            if value is not None and value < 2:
                raise ValueError(f"LLMQAT({name}={value}): at least 2 bits, or None for float")
        self.bits, self.input_bits, self.kv_bits, self.kv_place = bits, input_bits, kv_bits, kv_place
        self.key_value_layers, self.teacher, self.gradient = tuple(key_value_layers), teacher, gradient
        self.temperature, self.reduction = temperature, reduction
        self.logits, self.start = logits, start

    def quantization(self) -> dict[str, Any]:
        gradient = Below(2.0) if self.gradient == "released" else STE()
        scheme = {"weight": _weight(self.bits, gradient), "input": _per_token(self.input_bits, gradient)}
        kv = _per_token(self.kv_bits, gradient)
        if kv is None:
            return {**scheme, "start": self.start}
        if self.kv_place == "cache":
            return {**scheme, "kv_cache": kv, "start": self.start}
        rules = {name: {**scheme, "output": kv} for name in self.key_value_layers}
        return {**scheme, "rules": rules, "start": self.start}

    def extras(self) -> list[Callback]:
        loss = KL(temperature=self.temperature, reduction=self.reduction)
        return [DistillationCallback(self.teacher, losses={self.logits: loss}, task_weight=0.0)]


class Below(Gradient):
    """Straight-through where the magnitude of x is below a limit and zero elsewhere, whatever forward does there.

    Args:
        limit: The magnitude, of x itself and not in steps.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def slope(self, v: Tensor, q: Tensor, format: Format) -> Tensor:
        return v.new_ones(())

    def scale_factor(self, elements: int, format: Format) -> float:
        return 1.0


def _weight(bits: int, gradient: Gradient) -> Quantizer:
    if bits == 1:
        return Quantizer(Binary(), PerChannel(), scale=AbsMean(), gradient=gradient)
    if bits == 2:
        return Quantizer(Levels([-1.5, -0.5, 0.5, 1.5]), PerChannel(), scale=AbsMean(), gradient=gradient)
    return Quantizer(Int(bits, range="narrow"), PerChannel(), gradient=gradient)


def _per_token(bits: int | None, gradient: Gradient) -> Quantizer | None:
    return None if bits is None else Quantizer(Int(bits, range="narrow"), PerToken(), gradient=gradient)
