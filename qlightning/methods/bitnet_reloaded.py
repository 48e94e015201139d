"""BitNet b1.58 with a norm inside every layer, for small models, and the median as its scale."""

from typing import Any, Literal

from qlightning.layers.scheme import Scheme
from qlightning.methods.method import Method
from qlightning.numerics import (
    AbsMax,
    AbsMean,
    AbsMedian,
    Int,
    Nearest,
    PerTensor,
    PerToken,
    Quantizer,
    Stochastic,
    Ternary,
)
from qlightning.numerics.absmax_over import AbsMaxOver
from qlightning.numerics.transform import Transform
from qlightning.transforms.norm import LayerNorm, RMSNorm

Measure = Literal["median", "mean"]
Norm = Literal["layer", "rms", "none"]


class BitNetReloaded(Method):
    """Ternary weights with the median as their scale, 8-bit inputs per token, normalised inside the layer.

    Training is quantized from the first step on. Gradients pass straight through, also where values saturate, and
    scales are constants to them.

    Paper: BitNet b1.58 Reloaded: State-of-the-art Performance Also on Smaller Networks (Nielsen and Schneider-Kamp,
    2024, arXiv 2407.09527).

    Deviations: the bias is added after the result is scaled back (the released layer scales it too, by mistake). The
    floor of 1e-5 under medians and maxima is float32's smallest normal number here. Layers whose input has been
    normalised already are normalised once more, as in the paper; leave that out with norm="none".

    Args:
        measure: The scale of a weight: "median" of its magnitudes (the lower one of an even number) or their "mean"
            (BitNet b1.58).
        input_bits: Bits of layer inputs; None leaves them in float.
        largest: What the largest magnitude of a token becomes in 8 bits: 128 (the paper; a positive one saturates at
            127) or 127, which is exact on either side; half as much for every bit less.
        norm: What stands before the input's quantizer, without parameters: "layer" (the paper), "rms" or "none".
        rounding: "nearest", or "stochastic" for weights, with probability |w| / scale for a code that is not 0.
        start: When quantization begins, as in QATCallback. The norm acts from the start of the run in any case.
    """

    def __init__(
        self,
        *,
        measure: Measure = "median",
        input_bits: int | None = 8,
        largest: Literal[127, 128] = 128,
        norm: Norm = "layer",
        rounding: Literal["nearest", "stochastic"] = "nearest",
        start: int | float = 0,
    ) -> None:
        if largest not in (127, 128):
            raise ValueError(f"BitNetReloaded(largest={largest}): write 127 or 128")
        self.measure, self.input_bits, self.largest = measure, input_bits, largest
        self.norm, self.rounding, self.start = norm, rounding, start
        bit_linear(measure, input_bits=input_bits, largest=largest, norm=norm, rounding=rounding)  # says what is wrong

    def quantization(self) -> dict[str, Any]:
        scheme = bit_linear(
            self.measure, input_bits=self.input_bits, largest=self.largest, norm=self.norm, rounding=self.rounding
        )
        return {"rules": {"*": scheme}, "start": self.start}


def bit_linear(
    measure: Measure,
    *,
    input_bits: int | None = 8,
    largest: int = 128,
    norm: Norm = "layer",
    rounding: Literal["nearest", "stochastic"] = "nearest",
) -> Scheme:
    """BitLinear as a scheme; see `BitNetReloaded` for the arguments.

    Raises:
        ValueError: An argument is none of those named there.
    """
    scales = {"median": AbsMedian, "mean": AbsMean}
    norms: dict[str, type[Transform] | None] = {"layer": LayerNorm, "rms": RMSNorm, "none": None}
    roundings = {"nearest": Nearest, "stochastic": Stochastic}
    for name, value, known in (("measure", measure, scales), ("norm", norm, norms), ("rounding", rounding, roundings)):
        if value not in known:
            raise ValueError(f"{name}={value!r}: write {' or '.join(f'{name}={word!r}' for word in known)}")
    weight = Quantizer(Ternary(), PerTensor(), scale=scales[measure](), rounding=roundings[rounding]())
    inside = norms[norm]
    return Scheme(
        weight,
        input=None if input_bits is None else token_codes(input_bits, largest),
        transform=None if inside is None else inside(),
    )


def token_codes(bits: int, largest: int) -> Quantizer:
    """Integers per token whose largest magnitude becomes `largest` in 8 bits and as much less in fewer."""
    if largest == 127:
        return Quantizer(Int(bits, range="narrow"), PerToken(), scale=AbsMax())
    return Quantizer(Int(bits), PerToken(), scale=AbsMaxOver(largest * 2.0 ** (bits - 8)))
