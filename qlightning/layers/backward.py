"""The two matrix products of a linear layer's backward pass, with quantized operands.

A linear layer multiplies three times. With X (tokens M, in K), W (out N, in K) and dY (M, N):

    product   result          contracts   operands as their quantizers see them
    fprop     Y  = X W^T      K           X (M, K), W (N, K): the layer's input and weight quantizers
    dgrad     dX = dY W       N           dY (M, N), W^T (K, N)
    wgrad     dW = dY^T X     M           dY^T (N, M), X^T (K, M), both rotated along their tokens

Groups along the last dimension are thus always groups along what is contracted. The contraction itself is in
`contraction.py`. Only training knows of this: the deployed layer is its forward pass.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qlightning.numerics.layer_part import LayerPart
from qlightning.numerics.learned import Static
from qlightning.numerics.rounding import fold, process
from qlightning.numerics.spec import parse, unparse
from qlightning.numerics.tensor_quantizer import TensorQuantizer
from qlightning.numerics.transform import Basis

Slot = str | TensorQuantizer | None
"""A spec or quantizer of an operand's own; "same" for the operand as fprop has it; None for the operand in float."""

DGRAD, WGRAD = ("grad_dgrad", "weight_dgrad"), ("grad_wgrad", "input_wgrad")


class Backward(LayerPart):
    """What the four operands of dgrad and wgrad are quantized with.

    It acts as soon as the layer's weight quantizer does. Stochastic rounding takes other random numbers in each
    operand, layer, step and process.

    >>> Backward(grad_dgrad="nvfp4-sr", grad_wgrad="nvfp4-sr", input_wgrad="nvfp4").tokens
    16

    Args:
        grad_dgrad: dY, in groups along the output features or per token.
        weight_dgrad: W^T; "same" is the quantized weight of fprop, transposed.
        grad_wgrad: dY^T, in groups along the tokens or per channel.
        input_wgrad: X^T likewise; "same" is the quantized input of fprop, transposed.
        rotation: What both operands of wgrad are rotated by along their tokens before they are quantized. It cancels in
            the product.
        tokens: The tokens are padded with zeros to a multiple of this, of which groups and the rotation's block must
            be divisors.

    Raises:
        ValueError: A slot holds what it cannot.
    """

    place = "backward"

    def __init__(
        self,
        *,
        grad_dgrad: Slot = None,
        weight_dgrad: Slot = "same",
        grad_wgrad: Slot = None,
        input_wgrad: Slot = "same",
        rotation: Basis | None = None,
        tokens: int = 16,
    ) -> None:
        super().__init__()
        self.grad_dgrad, self.weight_dgrad = _read("grad_dgrad", grad_dgrad), _read("weight_dgrad", weight_dgrad)
        self.grad_wgrad, self.input_wgrad = _read("grad_wgrad", grad_wgrad), _read("input_wgrad", input_wgrad)
        self.rotation = rotation
        if tokens < 1:
            raise ValueError(f"tokens={tokens}: at least 1, for example Backward(tokens=16)")
        self.tokens = tokens

    def build(self, matrix: Tensor, features: int) -> None:
        outputs, inputs = matrix.shape
        shapes = {
            "grad_dgrad": (-1, outputs),
            "weight_dgrad": (inputs, outputs),
            "grad_wgrad": (outputs, self.tokens),
            "input_wgrad": (inputs, self.tokens),
        }
        for slot, shape in shapes.items():
            quantizer = getattr(self, slot)
            if isinstance(quantizer, TensorQuantizer):
                try:
                    quantizer.build(shape)
                except ValueError as error:
                    raise ValueError(f"{slot} {_spec(quantizer)}: {error}") from None
        if self.rotation is not None:
            self.rotation.build(matrix, self.tokens)

    def shown(self) -> Mapping[str, str]:
        shown = {}
        for slot in (*DGRAD, *WGRAD):
            held = getattr(self, slot)
            shown[slot] = _spec(held) if isinstance(held, TensorQuantizer) else held or "float"
        if self.rotation is not None:
            shown["rotation"] = type(self.rotation).__name__
        return shown

    def own(self, slot: str) -> TensorQuantizer | None:
        """The acting quantizer of an operand's own, or None."""
        quantizer = getattr(self, slot)
        return quantizer if isinstance(quantizer, TensorQuantizer) and quantizer.enabled else None

    def same(self, slot: str) -> bool:
        """Whether an operand is as fprop's quantizer makes it."""
        return isinstance(getattr(self, slot), str)

    def keys(self) -> tuple[Tensor | None, ...]:
        """What the randomness of one call is a function of, in the order of the slots."""
        own = [self.own(slot) for slot in (*DGRAD, *WGRAD)]
        return tuple(None if quantizer is None else fold(quantizer.rounding.key(), process()) for quantizer in own)

    def tokens_last(self, rows: Tensor) -> Tensor:
        """(..., features) as (features, tokens), padded with zeros to whole blocks of tokens, and rotated."""
        operand = rows.reshape(-1, rows.shape[-1]).t()
        if missing := -operand.shape[1] % self.tokens:
            operand = F.pad(operand, (0, missing))
        if self.rotation is None:
            return operand
        with torch.autocast(rows.device.type, enabled=False):
            exact: Tensor = self.rotation(operand.to(torch.promote_types(operand.dtype, torch.float32)))
        return exact

    def operands(self, product: Literal["dgrad", "wgrad"]) -> Iterator[TensorQuantizer]:
        """The operands' own quantizers of one product, whether they act or not."""
        held = (getattr(self, slot) for slot in (DGRAD if product == "dgrad" else WGRAD))
        return (quantizer for quantizer in held if isinstance(quantizer, TensorQuantizer))


def _read(slot: str, given: Slot) -> Slot:
    if given is None:
        return None
    if given == "same":
        if slot.startswith("grad"):
            raise ValueError(f"{slot}='same': fprop has no gradient; write a spec, for example {slot}='nvfp4-sr'")
        return given
    try:
        quantizer = parse(given) if isinstance(given, str) else given
    except ValueError as error:
        raise ValueError(f"{slot}={given!r}: {error}") from None
    if not isinstance(quantizer, TensorQuantizer):
        raise ValueError(f"{slot}={given!r}: write a spec, for example {slot}='nvfp4', or a TensorQuantizer")
    granularity, why = quantizer.granularity, ""
    if isinstance(quantizer.scale, Static):
        why = "a scale in backward is one of the values at hand; leave 'ema', 'learned' and 'lsq' out"
    elif slot == "grad_dgrad" and granularity.needs_fixed_rows:
        why = "its rows are tokens; write 'token' or a group, for example 'nvfp4-sr'"
    elif slot != "grad_dgrad" and granularity.needs_tokens:
        why = "its rows are channels; write 'channel' or a group, for example 'nvfp4-sr'"
    if why:
        raise ValueError(f"{slot}={_spec(quantizer)!r}: {why}")
    return quantizer


def _spec(quantizer: TensorQuantizer) -> str:
    return unparse(quantizer) or repr(quantizer)
