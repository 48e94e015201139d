"""The products of a linear layer on integer or 8-bit float tensor cores: codes are multiplied, not decoded values."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from qlightning.layers.backward import Backward
from qlightning.numerics import in_one_pass
from qlightning.numerics.code_product import LONGEST, Coded
from qlightning.numerics.floats import Float
from qlightning.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qlightning.numerics.layer_part import LayerPart
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.scales import Grid
from qlightning.numerics.tensor_quantizer import State, TensorQuantizer

Product = Literal["fprop", "dgrad", "wgrad"]


class OnCodes(LayerPart):
    """Multiply the quantizers' codes in training, and their scales with the sums: W8A8 and W4A8 in int8, or in E4M3.

    Both operands of a product have codes of one kind, int8 (integer formats of up to 8 bits without a zero point) or
    E4M3, and one scale per row along what is contracted: "int8-token" or "fp8e4m3-token" inputs and "int4-channel" or
    "fp8e4m3-channel" weights. In the forward pass integer weights may have a scale per group, "int4-g128". What comes
    out is the product of the decoded operands with fewer roundings (`numerics/code_product.py` and, for groups,
    `numerics/grouped_product.py` state the bound). Evaluation, export and a ramp of the quantizers multiply
    decoded values, as without this part.

    >>> OnCodes(["fprop"]).shown()
    {'product': 'codes in fprop'}

    Args:
        products: Which products: "fprop", the forward pass; "dgrad" and "wgrad", the input's and the weight's gradient,
            whose operands need quantizers of their own in the scheme's `backward`.

    Raises:
        ValueError: A product is unknown; from conversion, when a layer's operands have no such codes.
    """

    place = "product"

    def __init__(self, products: Sequence[Product] = ("fprop",)) -> None:
        super().__init__()
        self.products: tuple[Product, ...] = tuple(products)
        if not self.products or set(self.products) - set(get_args(Product)):
            raise ValueError(f"products={products!r}: write some of 'fprop', 'dgrad' and 'wgrad', as a list")

    def build(self, matrix: Tensor, features: int) -> None:
        if max(matrix.shape) > LONGEST:
            raise ValueError(f"int8 sums over {max(matrix.shape)} features may not fit into 32 bits: at most {LONGEST}")

    def shown(self) -> Mapping[str, str]:
        return {"product": f"codes in {' and '.join(self.products)}"}

    def on_attached(self, layer: Any) -> None:
        backward: Backward | None = layer.backward_part()
        for product in self.products:
            if product == "fprop":
                operands = [layer.quantizer("input"), layer.quantizer("weight")]
                hint = "write for example input='int8-token', weight='int8-channel' or 'int4-g128'"
            else:
                operands = [] if backward is None else list(backward.operands(product))
                first, second = ("token", "weight_dgrad") if product == "dgrad" else ("channel", "input_wgrad")
                hint = f"write backward={{'grad_{product}': 'int8-{first}', '{second}': 'int8-channel'}}"
            kinds = [kind_of_codes(operand) for operand in operands]
            if product == "fprop" and kinds[0] == "int8" and _in_groups(operands[1]):
                kinds[1] = "int8"
            if len(operands) != 2 or None in kinds or len(set(kinds)) != 1:
                shown = " and ".join(repr(operand) for operand in operands) or "nothing"
                raise ValueError(f"the operands of {product} have no codes that can be multiplied ({shown}): {hint}")

    def acts(self, product: Product, *quantizers: TensorQuantizer | None) -> bool:
        """Whether this product of operands with these quantizers is one of codes now."""
        if not self.training or product not in self.products:
            return False
        return all(q is not None and q.acts and q.strength is None for q in quantizers)


def kind_of_codes(quantizer: TensorQuantizer | None) -> str | None:
    """ "int8" or "float8" where codes can be multiplied as they are, or None."""
    if not isinstance(quantizer, Quantizer) or quantizer.transform is not None:
        return None
    if not isinstance(quantizer.granularity, PerTensor | PerChannel | PerToken) or not quantizer.format.symmetric:
        return None
    return "float8" if quantizer.format == Float(4, 3) else "int8" if _of_integers(quantizer) else None


def _in_groups(quantizer: TensorQuantizer | None) -> bool:
    """Whether codes are int8, with a scale per group along the row."""
    if not isinstance(quantizer, Quantizer) or quantizer.transform is not None:
        return False
    return isinstance(quantizer.granularity, PerGroup) and _of_integers(quantizer)


def _of_integers(quantizer: Quantizer) -> bool:
    format = quantizer.format
    return format.symmetric and format.integers and format.code_dtype == torch.int8


def encoded(
    quantizer: TensorQuantizer | None, operand: Tensor, key: Tensor | None, state: State | None = None
) -> Coded:
    """A tensor (..., K) as a matrix of codes, on a given grid or its own."""
    assert isinstance(quantizer, Quantizer)
    codes = None
    if state is None:
        codes, state = measured(quantizer, operand, key)
    scale = Grid(*state).step
    groups = isinstance(quantizer.granularity, PerGroup)
    if groups:
        scale = scale.flatten(-2)
    if quantizer.scale.static and groups:
        largest = quantizer.granularity.view(operand).amax(-1).float()
        scale = torch.where(largest.isnan(), largest, scale)
    elif quantizer.scale.static:  # others are NaN where a value is, and codes cannot be
        largest = operand.reshape(-1, operand.shape[-1]).amax(-1, keepdim=True).float()
        scale = torch.where(largest.isnan(), largest, scale.reshape(-1, 1))
    return as_matrix(_codes(quantizer, operand, state, key) if codes is None else codes, scale)


def measured(quantizer: Quantizer, operand: Tensor, key: Tensor | None) -> tuple[Tensor, State]:
    """The codes of a tensor on a grid of its own, and that grid."""
    if (made := in_one_pass.codes_of_columns(quantizer, operand)) is not None:
        codes, scale = made
        return codes, tuple(Grid(scale))
    state = tuple(quantizer.grid(operand))
    return _codes(quantizer, operand, state, key), state


def _codes(quantizer: Quantizer, operand: Tensor, state: State, key: Tensor | None) -> Tensor:
    """Codes as they are stored, or as the 8-bit floats that such codes mean, which compilers see through."""
    cast = quantizer.cast(operand, Grid(*state))
    return quantizer.codes(operand, state, key) if cast is None else quantizer.granularity.unview(cast, operand.shape)


def as_matrix(codes: Tensor, scale: Tensor) -> Coded:
    """Codes (..., K) as quantizers make and layers keep them, with their scales, as a matrix."""
    flat = codes.reshape(-1, codes.shape[-1])
    return Coded(flat.view(torch.float8_e4m3fn) if flat.dtype == torch.uint8 else flat, scale)
