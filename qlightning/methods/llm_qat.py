"""LLM-QAT: a language model learns its own quantization from itself, with text that it wrote."""

from typing import Any, Literal

from lightning.pytorch import Callback

from qlightning.callbacks.distillation import DistillationCallback
from qlightning.callbacks.teacher import SELF
from qlightning.losses.loss import Reduction
from qlightning.losses.soft import KL
from qlightning.methods.method import Method
from qlightning.numerics import AbsMean, Binary, Int, Levels, PerChannel, PerToken, Quantizer


class LLMQAT(Method):
    """Weights, inputs and the key-value cache quantized by their largest magnitude, taught by the float model's logits.

    The loss is the divergence from the float model alone; the task's own is left out. The paper trains on text that
    the float model wrote: `qlightning.data.generated.GeneratedText`.

    Paper: LLM-QAT: Data-Free Quantization Aware Training for Large Language Models (Liu et al., 2023, arXiv
    2305.17888).

    Deviations: scales are the largest magnitude over the largest code without the release's epsilons of 1e-6, so that a
    quantized value is exactly a code times its scale. Gradients pass straight through; the release's backward, which is
    zero where a magnitude is 2 or more although nothing is clipped, is not offered. The loss is the mean over tokens;
    the release's, per sequence, is `reduction="batch"` and grows with the sequence length.

    Args:
        bits: Bits of weights, one scale per output channel: 3 to 8 from the largest magnitude; 2 with values of 0.5 and
            1.5 mean magnitudes; 1 with the mean magnitude (the last two as in the release).
        input_bits: Bits of layer inputs, one scale per token; None leaves them in float.
        kv_bits: Bits of keys and values, one scale per token; None leaves them in float.
        kv_place: Where those are quantized: "projection", as their projections give them, before heads are split and
            keys are rotated (the paper); or "cache", per head after the rotation, as the cache holds them, which is
            what a runtime with a quantized cache computes.
        key_value_layers: Names of the projections of keys and values, for "projection".
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
        teacher: str = SELF,
        temperature: float = 1.0,
        reduction: Reduction = "tokens",
        logits: str = "forward",
        start: int | float = 0,
    ) -> None:
        if kv_place not in ("projection", "cache"):
            raise ValueError(f"LLMQAT(kv_place={kv_place!r}): write kv_place='projection' or kv_place='cache'")
        for name, value in (("input_bits", input_bits), ("kv_bits", kv_bits)):
            if value is not None and value < 2:
                raise ValueError(f"LLMQAT({name}={value}): at least 2 bits, or None for float")
        self.bits, self.input_bits, self.kv_bits, self.kv_place = bits, input_bits, kv_bits, kv_place
        self.key_value_layers, self.teacher = tuple(key_value_layers), teacher
        self.temperature, self.reduction = temperature, reduction
        self.logits, self.start = logits, start

    def quantization(self) -> dict[str, Any]:
        scheme = {"weight": _weight(self.bits), "input": _per_token(self.input_bits)}
        kv = _per_token(self.kv_bits)
        if kv is None:
            return {**scheme, "start": self.start}
        if self.kv_place == "cache":
            return {**scheme, "kv_cache": kv, "start": self.start}
        rules = {name: {**scheme, "output": kv} for name in self.key_value_layers}
        return {**scheme, "rules": rules, "start": self.start}

    def extras(self) -> list[Callback]:
        loss = KL(temperature=self.temperature, reduction=self.reduction)
        return [DistillationCallback(self.teacher, losses={self.logits: loss}, task_weight=0.0)]


def _weight(bits: int) -> Quantizer:
    if bits == 1:
        return Quantizer(Binary(), PerChannel(), scale=AbsMean())
    if bits == 2:
        return Quantizer(Levels([-1.5, -0.5, 0.5, 1.5]), PerChannel(), scale=AbsMean())
    return Quantizer(Int(bits, range="narrow"), PerChannel())


def _per_token(bits: int | None) -> Quantizer | None:
    return None if bits is None else Quantizer(Int(bits, range="narrow"), PerToken())
