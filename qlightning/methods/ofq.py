"""OFQ: low-bit vision transformers whose weights do not oscillate between two codes."""

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback

from qlightning.callbacks.distillation import DistillationCallback
from qlightning.callbacks.oscillation import ConfidenceAnnealing
from qlightning.callbacks.phase import Phase
from qlightning.layers.query_key import QueryKeyProduct
from qlightning.layers.scheme import Scheme
from qlightning.losses.soft import SoftCrossEntropy
from qlightning.methods.method import Method
from qlightning.numerics import (
    LSQ,
    STE,
    AbsMean,
    Gradient,
    Granularity,
    Int,
    Learned,
    LSQStep,
    PerChannel,
    PerTensor,
    Quantizer,
    UInt,
)
from qlightning.numerics.bins import Bins
from qlightning.numerics.near import NearThreshold
from qlightning.numerics.per_position import PerPosition
from qlightning.numerics.shifted import Shifted


class OFQ(Method):
    """Weights on a grid without zero whose scale is a statistic, scores from one quantized product, a calm ending.

    StatsQ: per row a = 2 mean |w|, 2^b equal bins of [-a, a], gradients straight through everywhere, none to a. Inputs,
    the product's intermediate, values and probabilities have learned steps (LSQ), inputs with a learned shift per
    feature before and after. Query and key projections are quantized as their product per head, without biases. At the
    end only weights near a threshold move. A float teacher of the same architecture is followed throughout.

    Paper: Oscillation-free Quantization for Low-bit Vision Transformers (Liu et al., ICML 2023, arXiv 2302.02210).

    Deviations: the soft loss is on the same logits as the hard one, which the paper gives two heads (DeiT's). Inputs of
    v and of the product are quantized each on their own. Entries of the product are held back by their gradient, as
    meant (the released code's mask has no effect there). One step per input instead of one per token position unless
    `positions` says how many there are. Annealing holds the 8-bit layers too, and steps learn at QATCallback's
    `scale_lr`.

    Args:
        bits: Bits of weights.
        input_bits: Bits of inputs, intermediates, values and probabilities.
        scores: What is quantized of queries and keys: their "product" (ViT-type attention without rotary embedding,
            norms or grouped heads) or the two "projections".
        positions: Tokens of every input, for a step per position; None for one step per tensor.
        boundary: Distance from a threshold within which weights move in the end, in gaps between codes; None for no
            annealing.
        anneal: When that begins: an optimizer step (int) or a share of the run (float).
        teacher: What is followed: "self" (the model when the run begins), the path of a checkpoint, or None.
        outer: Layers that keep 8 bits with learned steps, as patterns of rules.
        start: When quantization begins, as in QATCallback.
    """

    domain = "images"

    def __init__(
        self,
        bits: int = 2,
        *,
        input_bits: int = 2,
        scores: Literal["product", "projections"] = "product",
        positions: int | None = None,
        boundary: float | None = 0.005,
        anneal: int | float = 0.92,
        teacher: str | None = "self",
        outer: Sequence[str] = ("patch_embeddings.projection", "classifier"),
        start: int | float = 0,
    ) -> None:
        if scores not in ("product", "projections"):
            raise ValueError(f"OFQ(scores={scores!r}): write scores='product' or 'projections'")
        self.bits, self.input_bits, self.scores, self.positions = bits, input_bits, scores, positions
        self.boundary, self.anneal, self.teacher, self.start = boundary, anneal, teacher, start
        self.outer = (outer,) if isinstance(outer, str) else tuple(outer)

    def quantization(self) -> dict[str, Any]:
        weight, step, input = self._weight(STE()), self._step(), Shifted(self._step())
        inner, with_output = Scheme(weight, input=input), Scheme(weight, input=input, output=step)
        product = self.scores == "product"
        rewrite: Any = QueryKeyProduct() if product else None  # a transform, of attention
        rules: dict[str, Scheme | None] = {
            "*": inner,
            "v_proj": with_output,
            **dict.fromkeys(("q_proj", "k_proj"), None if product else with_output),
            "attention": Scheme(attention=self._probabilities(), transform=rewrite),
            **({"query_key": with_output} if product else {}),
            **dict.fromkeys(self.outer, _eight_bits()),
        }
        schedule = [Phase(self.start, quantize="all")]
        if product and self.boundary is not None:
            held = self._weight(NearThreshold(STE(), boundary=self.boundary))
            schedule.append(Phase(self.anneal, rules={"query_key": Scheme(held)}))
        return {"rules": rules, "schedule": schedule}

    def extras(self) -> list[Callback]:
        extras: list[Callback] = []
        if self.teacher is not None:
            extras.append(DistillationCallback(self.teacher, task_weight=1.0, losses={"forward": SoftCrossEntropy()}))
        if self.boundary is not None:
            extras.append(ConfidenceAnnealing(self.boundary, self.anneal))
        return extras

    def _weight(self, gradient: Gradient) -> Quantizer:
        return Quantizer(Bins(2**self.bits), PerChannel(), scale=AbsMean(multiplier=2.0), gradient=gradient)

    def _step(self) -> Quantizer:
        shared: Granularity = PerTensor() if self.positions is None else PerPosition(self.positions)
        return Quantizer(Int(self.input_bits), shared, scale=Learned(LSQStep()), gradient=LSQ())

    def _probabilities(self) -> Quantizer:
        format = UInt(self.input_bits)
        first = AbsMean(multiplier=4 * format.high**-0.5)
        return Quantizer(format, PerTensor(), scale=Learned(first), gradient=LSQ())


def _eight_bits() -> Scheme:
    weight = Quantizer(Int(8), PerChannel(), scale=Learned(LSQStep()), gradient=LSQ())
    return Scheme(weight, input=Quantizer(Int(8), PerTensor(), scale=Learned(LSQStep()), gradient=LSQ()))
