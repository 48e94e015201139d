"""Schemes: which quantizer sits at which placement of one layer."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from qlightning.adapters.adapter import Adapter
from qlightning.adapters.from_peft import FromPEFT
from qlightning.layers.backward import Backward
from qlightning.layers.on_codes import OnCodes
from qlightning.numerics.layer_part import LayerPart
from qlightning.numerics.part import Part
from qlightning.numerics.spec import parse
from qlightning.numerics.tensor_quantizer import TensorQuantizer
from qlightning.numerics.transform import Transform

Spec = str | TensorQuantizer
"""A spec string such as "int4-g128", or the parts themselves."""


class Scheme(Part):
    """The quantizers of one layer by placement; None leaves a placement in float.

    >>> Scheme(weight="int4-g128", input="int8-token").input
    Quantizer(Int(8), PerToken())

    Args:
        weight: The layer's weight, as the matrix (output channels, fan-in).
        input: The layer's input, features last.
        output: The layer's output, features last.
        kv_cache: Keys and values of an attention layer, after rotary embedding, per head: (..., head features).
        attention: The attention probabilities, (..., keys); an unsigned format such as "uint8" fits them.
        transform: What becomes of the input before it is quantized.
        adapter: What is trained inside the weight's quantizer in place of the weight, which is frozen: for example
            `LoRA(rank=8)`, or "peft", the adapters that PEFT has put around the layers of the model.
        backward: What the operands of the backward pass are quantized with, or its arguments as a mapping.
        product: "codes" to multiply int8 or E4M3 codes in the forward pass of training instead of decoded values, or
            an `OnCodes`, which can do so in backward too; decoded values when left out.
    """

    def __init__(
        self,
        weight: Spec | None = None,
        *,
        input: Spec | None = None,
        output: Spec | None = None,
        kv_cache: Spec | None = None,
        attention: Spec | None = None,
        transform: Transform | None = None,
        adapter: Adapter | Literal["peft"] | None = None,
        backward: Backward | Mapping[str, Any] | None = None,
        product: OnCodes | Literal["codes"] | None = None,
    ) -> None:
        self.weight = _quantizer("weight", weight)
        self.input = _quantizer("input", input)
        self.output = _quantizer("output", output)
        self.kv_cache = _quantizer("kv_cache", kv_cache)
        self.attention = _quantizer("attention", attention)
        self.transform = transform
        self.adapter: Adapter | None = _adapter(adapter)
        self.backward = Backward(**backward) if isinstance(backward, Mapping) else backward
        self.product = _product(product)
        if backward is not None and self.weight is None:
            raise ValueError(
                f"backward={self.backward!r} begins to act with the weight's quantizer: give a weight spec too"
            )
        if adapter is not None and self.weight is None:
            raise ValueError(f"adapter={adapter!r} sits inside the weight's quantizer: give a weight spec too")

    def items(self) -> Iterator[tuple[str, TensorQuantizer]]:
        """(placement, quantizer) of the placements that are quantized."""
        for placement in ("weight", "input", "output", "kv_cache", "attention"):
            if (quantizer := getattr(self, placement)) is not None:
                yield placement, quantizer

    def parts(self) -> Iterator[LayerPart]:
        """What the layer gets beside quantizers."""
        yield from (part for part in (self.transform, self.adapter, self.backward, self.product) if part is not None)


def _adapter(given: Adapter | str | None) -> Adapter | None:
    if isinstance(given, str):
        if given != "peft":
            raise ValueError(f"adapter={given!r}: write adapter='peft', or an adapter such as LoRA(rank=8)")
        return FromPEFT()
    return given


def _product(given: OnCodes | str | None) -> OnCodes | None:
    if isinstance(given, str):
        if given != "codes":
            raise ValueError(f"product={given!r}: write product='codes', or OnCodes(['fprop', 'dgrad', 'wgrad'])")
        return OnCodes()
    return given


def _quantizer(placement: str, spec: Spec | None) -> TensorQuantizer | None:
    if spec is None:
        return None
    if not isinstance(spec, get_args(Spec)):
        raise ValueError(
            f"{placement}={spec!r}: write a spec, for example {placement}='int8-tensor', or a TensorQuantizer"
        )
    try:
        quantizer = parse(spec) if isinstance(spec, str) else spec
    except ValueError as error:
        raise ValueError(f"{placement}={spec!r}: {error}") from None
    granularity = quantizer.granularity
    if placement == "weight" and granularity.needs_tokens:
        raise ValueError(f"{placement}={spec!r}: a weight has no tokens; write a 'channel' or group granularity")
    if placement != "weight" and granularity.needs_fixed_rows:
        raise ValueError(
            f"{placement}={spec!r}: an activation has no fixed rows to give a scale each; write a 'token' or 'tensor' "
            f"granularity, for example {placement}='int8-token'"
        )
    return quantizer


def as_scheme(value: "Scheme | Spec | Mapping[str, Any] | None") -> Scheme | None:
    """A scheme from what a rule may say: a Scheme, a spec for the weight, a mapping of placements, or None (float)."""
    if value is None or isinstance(value, Scheme):
        return value
    if isinstance(value, Mapping):
        try:
            return Scheme(**value)
        except TypeError:
            raise ValueError(
                f"{dict(value)!r} is no scheme; write for example {{'weight': 'int4-g128', 'input': 'int8-token'}}"
            ) from None
    return Scheme(weight=value)
