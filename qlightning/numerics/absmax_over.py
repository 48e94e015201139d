"""Absmax with a bound of one's own: papers disagree on which code the largest magnitude is."""

from torch import Tensor

from qlightning.numerics.formats import Format
from qlightning.numerics.scales import Measured
from qlightning.numerics.statistics import absmax, divide


class AbsMaxOver(Measured):
    """absmax / bound, whatever the format covers.

    Two conventions for eight bits: 127 makes the largest magnitude exact on either side; 128 uses every code, and what
    would be code 128 saturates at 127. For b bits 2^(b-1) - 1 leaves the largest magnitude where it is (ParetoQ).

    Args:
        bound: The magnitude in units of the step that the largest value of a block becomes.
    """

    order_free = True

    def __init__(self, bound: float) -> None:
        super().__init__()
        if not bound > 0:
            raise ValueError(f"AbsMaxOver({bound}): must be positive, for example AbsMaxOver(127)")
        self.bound = bound

    def measure(self, blocks: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
        return divide(absmax(blocks, self.pool), self.bound), None
