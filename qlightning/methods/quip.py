"""QuIP: two-bit weights by incoherence processing and adaptive rounding, as the beginning of training."""

from typing import Any

from torch import Tensor

from qlightning import solvers
from qlightning.methods.method import Method
from qlightning.numerics import PerTensor, Quantizer
from qlightning.numerics.bins import Bins
from qlightning.numerics.formats import Format
from qlightning.numerics.scales import Measured
from qlightning.numerics.statistics import divide
from qlightning.solvers.incoherence import Incoherence


class RMS(Measured):
    """The outermost value of the grid lies at `rho` root mean squares.

    Args:
        rho: In units of the block's root mean square.
    """

    def __init__(self, *, rho: float = 2.4) -> None:
        super().__init__()
        if not rho > 0:
            raise ValueError(f"RMS(rho={rho}): positive, for example RMS(rho=2.4)")
        self.rho = rho

    def measure(self, blocks: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
        rms = blocks.float().square().mean(-1, keepdim=True).sqrt()
        return divide(self.rho * rms, format.high), None


class QuIP(Method):
    """Weights quantized in a randomly rotated basis, in which nothing sticks out, from LDLQ's solution on.

    W is rounded as U W V^T with random orthogonal U and V, on one uniform grid of 2^bits levels within 2.4 root mean
    squares, without a zero: the quantizer works in that basis, so the solution lies on its grid, and can be trained on
    and deployed as any other.

    Paper: QuIP: 2-Bit Quantization of Large Language Models With Guarantees (Chee et al., NeurIPS 2023,
    arXiv 2307.13304).

    Deviations: the paper's result is final, here training goes on from it, on the grid on which it was found. The
    paper's rescaling of input channels before the rotation is left out: the quantizer's basis has to be orthogonal. U
    and V of layers of one size are the same. The Hessian gets one damping, where the released code adds 0.01 twice. For
    the paper's procedure with both, as a final result in plain values, calibrate without training,
    `qlightning.solvers.calibrate(module, batches, qlightning.solvers.QuIP())`.

    Args:
        bits: Bits of weights.
        greedy: Passes of coordinate descent after LDLQ.
        rho: Half width of the grid in root mean squares.
        damping: Added to the Hessian's diagonal, in units of its mean.
        batches: Number of batches of calibration data.
        seed: Of the rotations.
        start: When weights are solved and quantization begins, as in QATCallback.
    """

    def __init__(
        self,
        bits: int = 2,
        *,
        greedy: int = 1,
        rho: float = 2.4,
        damping: float = 0.02,
        batches: int = 128,
        seed: int = 0,
        start: int | float = 0,
    ) -> None:
        self.bits, self.greedy, self.rho, self.damping = bits, greedy, rho, damping
        self.batches, self.seed, self.start = batches, seed, start

    def quantization(self) -> dict[str, Any]:
        basis = Incoherence(seed=self.seed)
        weight = Quantizer(Bins(2**self.bits), PerTensor(), scale=RMS(rho=self.rho), transform=basis)
        order: Any = "activation" if self.greedy else "natural"
        init = solvers.LDLQ(greedy=self.greedy, order=order, damping=self.damping, batches=self.batches)
        return {"weight": weight, "init": init, "start": self.start}
