"""Integer-programming allocation: bits by layer from measured loss increases, inside a budget."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback

from qlightning.allocation.program import Cost
from qlightning.callbacks.allocation import AllocationCallback, finest
from qlightning.callbacks.phase import Spec
from qlightning.methods.method import Method


class IntegerAllocation(Method):
    """The bits of every layer as an integer program: the smallest sum of loss increases within a budget.

    Each layer alone is put at each candidate while the others stay at the finest, and the rise of the loss is
    measured; increases below 1e-6 count as 1e-6. Then training goes on with what was found.

    Paper: Accurate Post Training Quantization With Small Calibration Sets (Hubara, Nahshan, Hanani, Banner and Soudry,
    ICML 2021, arXiv 2006.10518: Improving Post Training Neural Quantization: Layer-wise Calibration and Integer
    Programming).

    Deviations: the integer program alone; the layer-wise optimization (AdaQuant), para-normalisation and bias tuning
    are not here, and layers are rounded to nearest where the paper measures the optimized ones. The budget counts
    scales and zero points. All candidates share granularity and kind of scale, because a run only switches formats.

    Args:
        candidates: Specs of weights.
        budget: Bits per weight, scales and zero points included; or, of "bit_operations": as many of them as if every
            weight had so many bits.
        of: What the budget is of, "bytes" or "bit_operations".
        batches: Number of training batches the loss is measured on.
    """

    def __init__(
        self,
        candidates: Sequence[Spec] = ("int2-channel", "int4-channel", "int8-channel"),
        *,
        budget: float = 4.0,
        of: Cost = "bytes",
        batches: int = 4,
    ) -> None:
        self.candidates = candidates
        self.budget, self.of, self.batches = budget, of, batches
        self.extras()

    def quantization(self) -> dict[str, Any]:
        return {"weight": finest(self.candidates)}

    def extras(self) -> list[Callback]:
        return [AllocationCallback(self.candidates, self.budget, of=self.of, batches=self.batches)]
