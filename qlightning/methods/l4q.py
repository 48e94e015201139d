"""L4Q: LoRA merged into the weight before an LSQ+ quantizer, on PEFT models as users have them or without PEFT."""

from typing import Any, Literal

from qlightning.adapters import FromPEFT, LoRA
from qlightning.layers.scheme import Scheme
from qlightning.methods.method import Method
from qlightning.numerics import LSQ, Int, Learned, Quantizer, granularity_of
from qlightning.numerics.cover import Cover


class L4Q(Method):
    """LoRA inside a learned quantizer: Q(W + scaling * B A), where the frozen W is never quantized alone.

    The layer is one matmul with one quantized weight in training as in deployment. Its backward keeps no tensor as
    large as a weight: weight, codes and the gradient of the weight are made where they are needed and dropped. What
    trains: A, B, and per group a step and an offset.

    On a model that PEFT has wrapped, `get_peft_model(model, LoraConfig(...))`, its adapters are moved inside and its
    config says rank, scaling and layers; layers that it does not wrap are quantized, and of them only step and offset
    train. Every other model gets adapters of our own in all layers that the rules convert; what trains beside them
    (norms, embeddings, biases) is what requires gradients.

    Paper: L4Q: Parameter Efficient Quantization-Aware Fine-Tuning on Large Language Models (Jeon, Kim, Kim, ACL 2025,
    arXiv 2402.04902).

    Deviations: the formulas are those of two agreeing summaries (secondary); that the offset starts at 0, and rank 4,
    are (from memory). The gradient of a step is not damped by 1 / sqrt(elements), as the summaries have it. The local
    gradient of a weight is made whole, not in pieces of output channels. Learning rates are not verified; steps
    learn at QATCallback's `scale_lr`. Group sizes and the warm-up are (secondary).

    Args:
        bits: Bits of weights; the paper's are 3 and 4.
        granularity: What shares step and offset: "channel" or a group size, the paper's 128, and 64 for models of 3
            billion parameters.
        rank: Of our own adapters.
        scaling: What B A is multiplied by in our own adapters (the paper's alpha, which is not divided by the rank).
        offset: "learned" (the paper) or "none", a symmetric grid, which more runtimes can serve.
        start: When quantization begins, as in QATCallback: before it the adapters train alone (the paper's optional
            warm-up).
    """

    def __init__(
        self,
        bits: int = 4,
        *,
        granularity: Literal["channel"] | int = 128,
        rank: int = 4,
        scaling: float = 1.0,
        offset: Literal["learned", "none"] = "learned",
        start: int | float = 0,
    ) -> None:
        self.bits, self.granularity, self.rank = bits, granularity, rank
        self.scaling, self.offset, self.start = scaling, offset, start
        if offset not in ("learned", "none"):
            raise ValueError(f"L4Q(offset={offset!r}): write offset='learned' or offset='none'")

    def quantization(self) -> dict[str, Any]:
        adapter = FromPEFT(otherwise=LoRA(self.rank, alpha=self.scaling * self.rank))
        return {"rules": {"*": Scheme(self._weight(), adapter=adapter)}, "start": self.start}

    def _weight(self) -> Quantizer:
        shared = granularity_of(self.granularity)
        learned = self.offset == "learned"
        scale = Learned(Cover(), zero="real" if learned else "integer")
        return Quantizer(Int(self.bits, symmetric=not learned), shared, scale=scale, gradient=LSQ(factor=1.0))
