"""LSQ and LSQ+: the baseline that every other method is compared with."""

from typing import Any, Literal

from qlightning.methods.method import Method
from qlightning.numerics import (
    Int,
    Learned,
    LSQStep,
    PerTensor,
    Quantizer,
    gradients,
    granularity_of,
)


class LSQ(Method):
    """Learned step sizes: every quantizer's step is a parameter with a gradient of its own.

    Paper: Learned Step Size Quantization (Esser et al., ICLR 2020, arXiv 1902.08153); LSQ+ (Bhalgat et al., CVPR
    Workshops 2020, arXiv 2004.09576) for `offset=True`.

    Deviations: which layers keep 8 bits (the papers: first and last) is said with rules, since any model may be
    trained. The offset of LSQ+ is kept real, as in the paper, and its step starts from min and max, not from the
    paper's search. Steps learn at QATCallback's `scale_lr`, a tenth of the weights' rate, the papers' at the whole one.
    Weights have one step per output channel by default; the paper's "tensor" is an argument.

    Args:
        bits: Bits of weights.
        input_bits: Bits of layer inputs; None leaves them in float.
        granularity: What shares a step of the weights: "tensor" (the papers), "channel", or a group size.
        offset: Give inputs a learned offset (LSQ+), for inputs that are not centred on zero.
        start: When quantization begins, as in QATCallback.
    """

    def __init__(
        self,
        bits: int = 4,
        *,
        input_bits: int | None = None,
        granularity: Literal["tensor", "channel"] | int = "channel",
        offset: bool = False,
        start: int | float = 0,
    ) -> None:
        self.bits, self.input_bits = bits, input_bits
        self.granularity, self.offset, self.start = granularity, offset, start

    def quantization(self) -> dict[str, Any]:
        return {"weight": self._weight(), "input": self._input(), "start": self.start}

    def _weight(self) -> Quantizer:
        shared = granularity_of(self.granularity)
        return Quantizer(Int(self.bits), shared, scale=Learned(LSQStep()), gradient=gradients.LSQ())

    def _input(self) -> Quantizer | None:
        if self.input_bits is None:
            return None
        format = Int(self.input_bits, symmetric=not self.offset)
        scale = Learned(zero="real") if self.offset else Learned(LSQStep())
        return Quantizer(format, PerTensor(), scale=scale, gradient=gradients.LSQ())
