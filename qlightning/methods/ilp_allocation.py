"""Integer-programming allocation: bits by layer from measured loss increases, inside a budget."""

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback

from qlightning.allocation.program import Cost
from qlightning.callbacks.allocation import AllocationCallback, finest
from qlightning.callbacks.normalization import Normalization
from qlightning.callbacks.phase import Spec
from qlightning.methods.method import Method
from qlightning.solvers import AdaQuant


class IntegerAllocation(Method):
    """The bits of every layer as an integer program: the smallest sum of loss increases within a budget.

    Each layer alone is put at each candidate while the others stay at the finest, and the rise of the loss is
    measured; increases below 1e-6 count as 1e-6. Then training goes on with what was found. For convolutional models
    write layers="adaquant" and norms="measured": AdaQuant finds every layer at every candidate before it is measured,
    and batch norms are repaired afterwards.

    Paper: Accurate Post Training Quantization With Small Calibration Sets (Hubara, Nahshan, Hanani, Banner and Soudry,
    ICML 2021, arXiv 2006.10518: Improving Post Training Neural Quantization: Layer-wise Calibration and Integer
    Programming).

    Deviations: the paper's last step, tuning biases towards the float outputs, is not here (distillation with the other
    parameters frozen is that). Batch norms keep their place: their statistics are measured anew where they are, which
    is what re-inserting folded ones comes to (see `solvers/batch_norm.py` for folding). The budget counts scales and
    zero points. All candidates share granularity and kind of scale, because a run only switches formats.

    Args:
        candidates: Specs of weights.
        budget: Bits per weight, scales and zero points included; or, of "bit_operations": as many of them as if every
            weight had so many bits.
        of: What the budget is of, "bytes" or "bit_operations".
        batches: Number of training batches the loss is measured on.
        layers: What layers are measured with, and training begins with, at each candidate: weights rounded to the
            "nearest" value, or found by "adaquant" (the paper's advanced pipeline), for which scales are learned ones,
            candidates=["int4-channel-asym-learned", ...].
        steps: Of Adam for each layer and candidate, for "adaquant".
        norms: Whether batch norms are "kept", or their statistics "measured" anew once bits are found.
    """

    def __init__(
        self,
        candidates: Sequence[Spec] = ("int2-channel", "int4-channel", "int8-channel"),
        *,
        budget: float = 4.0,
        of: Cost = "bytes",
        batches: int = 4,
        layers: Literal["nearest", "adaquant"] = "nearest",
        steps: int = 1000,
        norms: Literal["kept", "measured"] = "kept",
    ) -> None:
        if layers not in ("nearest", "adaquant") or norms not in ("kept", "measured"):
            raise ValueError(
                f"IntegerAllocation(layers={layers!r}, norms={norms!r}): write layers='nearest' or 'adaquant', "
                "norms='kept' or 'measured'"
            )
        self.candidates = candidates
        self.budget, self.of, self.batches = budget, of, batches
        self.layers, self.steps, self.norms = layers, steps, norms
        self.extras()

    def quantization(self) -> dict[str, Any]:
        return {"weight": finest(self.candidates)}

    def extras(self) -> list[Callback]:
        solver = AdaQuant(steps=self.steps, batches=self.batches) if self.layers == "adaquant" else None
        options: dict[str, Any] = {"of": self.of, "batches": self.batches, "solver": solver}
        measured = [Normalization(self.batches)] if self.norms == "measured" else []
        return [AllocationCallback(self.candidates, self.budget, **options), *measured]
