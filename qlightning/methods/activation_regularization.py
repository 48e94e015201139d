"""Activation regularization: learned clips on layer inputs and a penalty on the kurtosis of layer outputs."""

from typing import Any, ClassVar, Literal

from lightning.pytorch import Callback
from torch import Tensor

from qlightning.callbacks.regularizer import RegularizerCallback
from qlightning.losses.kurtosis import Kurtosis
from qlightning.methods.method import Method
from qlightning.numerics import ClippedSTE, Format, Int, Learned, Measured, PerTensor, Quantizer


class ActivationRegularization(Method):
    """Pretraining that leaves no outlier channels: low-bit inputs with two learned clips, and flat outputs.

    Quantized inputs alone would move the difficulty into large rows of the weights; the penalty on outputs closes that
    way. Weights train in float and are rounded afterwards (`qlightning calibrate`).

    Paper: Mitigating the Impact of Outlier Channels for Language Model Quantization with Activation Regularization
    (Nrusimha et al., 2024, arXiv 2404.03605). The penalty's weight and its sum over tokens are second-hand; what clips
    start from (a few standard deviations of early activations) is from memory.

    Deviations: what is learned is step and offset, (c+ - c-) / (2^bits - 1) and the value of code 0, instead of the
    clips c+ and c- themselves. That is the same quantizer and, by the chain rule, the same gradient of the clips; steps
    of an optimizer that scales each parameter's gradient (Adam) differ. They learn at QATCallback's `scale_lr`.

    Args:
        bits: Bits of layer inputs, one range per tensor.
        weight: What the summed kurtosis is multiplied by.
        targets: Layers whose outputs are penalised: patterns as `RegularizerCallback` takes them.
        reduction: Of the kurtosis over tokens, "sum" (the paper) or "tokens", their mean.
        clips: Where the clips start, in standard deviations of what the calibration steps see on either side of the
            mean; never beyond the largest and smallest value.
        zero: "real": the range lies where the clips say, and zero need not be on the grid (the paper). "integer": the
            range is shifted so that zero is on the grid.
        start: When quantization begins, as in QATCallback.
    """

    deploys: ClassVar[bool] = False

    def __init__(
        self,
        *,
        bits: int = 4,
        weight: float = 1e-5,
        targets: tuple[str, ...] = ("layers.**_proj",),
        reduction: Literal["sum", "tokens"] = "sum",
        clips: float = 4.0,
        zero: Literal["real", "integer"] = "real",
        start: int | float = 0,
    ) -> None:
        self.bits, self.weight, self.targets, self.reduction = bits, weight, tuple(targets), reduction
        self.clips, self.zero, self.start = clips, zero, start
        Deviations(clips)

    def quantization(self) -> dict[str, Any]:
        scale = Learned(Deviations(self.clips), zero=self.zero)
        format = Int(self.bits, symmetric=False)
        return {"input": Quantizer(format, PerTensor(), scale=scale, gradient=ClippedSTE()), "start": self.start}

    def extras(self) -> list[Callback]:
        penalty = Kurtosis(reduction=self.reduction)
        return [RegularizerCallback(list(self.targets), weight=self.weight, penalty=penalty)]


class Deviations(Measured):
    """A range of so many standard deviations on either side of the mean, within the smallest and largest value.

    Args:
        times: How many.
    """

    offset = True

    def __init__(self, times: float = 4.0) -> None:
        super().__init__()
        if not times > 0:
            raise ValueError(f"Deviations({times}): above 0, for example Deviations(4.0)")
        self.times = times

    def measure(self, blocks: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
        x = blocks.float()
        mean, reach = x.mean(-1, keepdim=True), self.times * x.std(-1, keepdim=True, correction=0)
        low, high = x.aminmax(dim=-1, keepdim=True)
        lower, upper = (mean - reach).maximum(low), (mean + reach).minimum(high)
        return (upper - lower) / (format.high - format.low), lower
