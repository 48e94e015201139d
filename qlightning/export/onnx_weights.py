"""Trained weights in an ONNX graph: codes, scales and zero points, and the DequantizeLinear that reads them.

| scales | codes (O outputs, I inputs) | scale, zero point | DequantizeLinear |
| --- | --- | --- | --- |
| per tensor | (O, I) | () | |
| per channel | (O, I), or as a convolution has its weight | (O,) | axis 0 |
| per group of g | (O, I) | (O, I / g) | axis 1, block_size g |
| per block of r x c | (O, I) | (O, I / c), each r times | axis 1, block_size c |

Codes of at most 2 bits are INT2 from operator set 25 on, always in blocks (of a whole row, if need be), of at most 4
bits INT4, of at most 8 bits INT8; floats are FLOAT8E4M3FN and FLOAT8E5M2. Each is what `Weight.quantize` gave.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlightning.export.onnx_trace import BORDER, STORED
from qlightning.export.target import Plan
from qlightning.export.trained import Weight
from qlightning.numerics.floats import Float
from qlightning.numerics.granularity import PerBlock, PerChannel, PerGroup, PerTensor
from qlightning.numerics.quantizer import Quantized

INT2_OPSET = 25

_FLOATS = {Float(4, 3): torch.float8_e4m3fn, Float(5, 2): torch.float8_e5m2}


def misfit(weight: Weight) -> str | None:
    """Why DequantizeLinear cannot say what a weight's codes mean, or None."""
    if not weight.has_codes:
        return "it is not one grid of codes and scales"
    quantizer = weight.quantizer
    format, granularity, scale = quantizer.format, quantizer.granularity, quantizer.scale
    if scale.ships_as is not None:
        return f"onnxruntime has no kernel for codes with {scale!r}: train with 'int4-g32' or 'fp8e4m3'"
    if format not in _FLOATS and (weight.integer_bits is None or weight.integer_bits > 8):
        return f"{format!r} is neither an integer of at most 8 bits nor fp8: train with 'int4-g32', 'int8' or 'fp8e4m3'"
    if not isinstance(granularity, PerGroup | PerChannel | PerTensor | PerBlock):
        return f"scales are per tensor, channel, group or block there, not {granularity!r}"
    if not format.symmetric and scale.real_zero:
        return "zero points are codes there, and its own are real numbers: train with Learned(zero='integer')"
    return None


class Stored(NamedTuple):
    """What DequantizeLinear is given.

    Attributes:
        bits: Of a code; None for float codes.
        scale: float32, of the shape in the table above.
        zero: int8 of the scale's shape, or None.
        axis: Along which blocks run or channels lie.
        block: Elements per scale along the axis; 0 for scales per channel or tensor.
    """

    bits: int | None
    scale: Tensor
    zero: Tensor | None
    axis: int
    block: int


def stored_scales(weight: Weight, stored: Quantized, *, opset: int) -> Stored:
    """Scales and zero points of a weight as the operator takes them."""
    place, axis, block = _placed(weight, opset)
    scale = place(stored.scale).float().cpu().contiguous()
    zero = None if stored.zero_point is None else place(stored.zero_point).to(torch.int8).cpu().contiguous()
    if zero is None and not block and weight.quantizer.format not in _FLOATS:
        zero = torch.zeros(scale.shape, dtype=torch.int8)  # said, for runtimes that want it with integer kernels
    return Stored(None if weight.quantizer.format in _FLOATS else weight.integer_bits, scale, zero, axis, block)


def _placed(weight: Weight, opset: int) -> tuple[Callable[[Tensor], Tensor], int, int]:
    granularity = weight.quantizer.granularity
    if _in_two_bits(weight, opset) and isinstance(granularity, PerTensor | PerChannel):
        # as blocks of a row each: onnxruntime 1.32 transposes other constants and then fails on those of 2 bits
        rows, columns = weight.layer.weights()[weight.prefix].shape
        return lambda scale: scale.reshape(-1, 1).expand(rows, 1), 1, columns
    if isinstance(granularity, PerTensor):
        return lambda scale: scale.reshape(()), 0, 0
    if isinstance(granularity, PerChannel):
        return lambda scale: scale.reshape(-1), 0, 0
    if isinstance(granularity, PerGroup):
        return lambda scale: scale.squeeze(-1), 1, granularity.size
    assert isinstance(granularity, PerBlock)
    rows = granularity.rows
    return lambda scale: scale.squeeze(-1).repeat_interleave(rows, 0), 1, granularity.columns


def _in_two_bits(weight: Weight, opset: int) -> bool:
    return opset >= INT2_OPSET and (weight.integer_bits or 8) <= 2


def codes_of(weight: Weight) -> Tensor:
    """Codes (O, I) as int8 or float8, on the CPU."""
    stored, format = weight.quantize(), weight.quantizer.format
    codes = stored.codes.view(_FLOATS[format]) if format in _FLOATS else weight.integers(stored.codes)
    return codes.cpu()


@torch.no_grad()
def float_values(weight: Weight) -> Tensor:
    """Values (O, I) as the artifact has them, float32 on the CPU: not rounded to the dtype that was trained in."""
    if misfit(weight) is None:
        values: Tensor = weight.quantizer.dequantize(weight.quantize(), torch.float32)
    else:
        values = weight.quantizer(weight.layer.effective(weight.prefix)).float()
    return values.cpu()


# --- in the graph ---


def store_weights(model: Any, plan: Plan, *, opset: int) -> dict[str, Any]:
    """Put the artifact's weights in the place of their marks. Returns the value that is each weight, by its name.

    What is large is made only when the file is written, one tensor at a time.
    """
    import onnx_ir as ir

    weights, first = {weight.name: weight for weight in plan.trained.weights}, plan.trained.tied()
    made: dict[tuple[str, int], Any] = {}
    values: dict[str, Any] = {}
    for node in [node for node in model.graph if f"{node.domain}::{node.op_type}" == STORED]:
        weight = weights[node.attributes["name"].as_string()]
        replaced, shape = _replaced(node, weight, plan, opset)
        key = first.get(weight.name, weight.name), id(weight.quantizer)
        if key not in made or made[key].shape != shape:
            made[key] = (
                _float_value(model, weight, shape)
                if weight.name in plan.in_float
                else _dequantized(model, node, weight, shape, opset)
            )
        values[weight.name] = made[key]
        ir.convenience.replace_all_uses_with(replaced, made[key], replace_graph_outputs=True)
    return values


def _replaced(node: Any, weight: Weight, plan: Plan, opset: int) -> tuple[Any, Any]:
    """The value that the stored weight stands for, and its shape.

    A convolution's weight per channel is stored in its own shape, which runtimes look for, if that follows at once.
    """
    import onnx_ir as ir

    (output,) = node.outputs
    uses = [use.node for use in output.uses()]
    rows, columns = weight.layer.weights()[weight.prefix].shape
    in_float = weight.name in plan.in_float
    whole = in_float or _placed(weight, opset)[2] == 0
    if whole and len(uses) == 1 and uses[0].op_type == "Reshape" and not output.is_graph_output():
        shape = uses[0].outputs[0].shape
        if shape is not None and shape[0] == rows and all(isinstance(size, int) for size in shape):
            return uses[0].outputs[0], shape
    return output, ir.Shape((rows, columns))


def _dequantized(model: Any, node: Any, weight: Weight, shape: Any, opset: int) -> Any:
    import onnx_ir as ir

    stored = stored_scales(weight, weight.quantize(), opset=opset)
    kind = _kind(weight, stored, opset)
    inputs = [
        _initializer(model, f"{weight.name}_codes", kind, shape, lambda: codes_of(weight).reshape(tuple(shape))),
        _initializer(model, f"{weight.name}_scale", ir.DataType.FLOAT, stored.scale.shape, lambda: stored.scale),
    ]
    if stored.zero is not None:
        zero = stored.zero
        inputs.append(_initializer(model, f"{weight.name}_zero_point", kind, zero.shape, lambda: zero))
    attributes = [ir.AttrInt64("axis", stored.axis)]
    if stored.block:
        attributes.append(ir.AttrInt64("block_size", stored.block))
    value = ir.Value(name=f"{weight.name}_values", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    made = ir.Node("", "DequantizeLinear", inputs, attributes, outputs=[value], name=f"{weight.name}_dequantize")
    node.prepend(made)
    return value


def _float_value(model: Any, weight: Weight, shape: Any) -> Any:
    import onnx_ir as ir

    def make() -> Tensor:
        return float_values(weight).reshape(tuple(shape))

    return _initializer(model, f"{weight.name}_values", ir.DataType.FLOAT, shape, make)


def _kind(weight: Weight, stored: Stored, opset: int) -> Any:
    import onnx_ir as ir

    if stored.bits is None:
        e4m3 = _FLOATS[weight.quantizer.format] is torch.float8_e4m3fn
        return ir.DataType.FLOAT8E4M3FN if e4m3 else ir.DataType.FLOAT8E5M2
    if _in_two_bits(weight, opset):
        return ir.DataType.INT2
    return ir.DataType.INT4 if stored.bits <= 4 else ir.DataType.INT8


def _initializer(model: Any, name: str, kind: Any, shape: Any, make: Callable[[], Tensor]) -> Any:
    """An initializer that is made when it is written."""
    import onnx_ir as ir

    def tensor() -> Any:
        made = make().contiguous()
        array = made.view(torch.uint8).numpy().view(kind.numpy()) if _is_float8(made) else made.numpy()
        return ir.Tensor(array.astype(kind.numpy(), copy=False), dtype=kind, name=name)

    lazy = ir.LazyTensor(tensor, dtype=kind, shape=ir.Shape(shape), name=name)
    value = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape), const_value=lazy)
    model.graph.initializers[name] = value
    return value


def _is_float8(x: Tensor) -> bool:
    return x.dtype in _FLOATS.values()


class Border(NamedTuple):
    """The values at the inputs and outputs of a layer, by place or name."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]

    def names(self) -> dict[str, dict[str, str]]:
        """As plain data."""
        return {side: {which: value.name for which, value in found.items()} for side, found in self._asdict().items()}


def take_borders(model: Any) -> dict[str, Border]:
    """Take the marks of layers out. Returns where each layer is, at its first call."""
    import onnx_ir as ir

    found: dict[str, Border] = {}
    for node in [node for node in model.graph if f"{node.domain}::{node.op_type}" == BORDER]:  # in the order of calls
        (source,), (output,) = node.inputs, node.outputs
        layer, side, which = (node.attributes[name].as_string() for name in ("layer", "side", "which"))
        getattr(found.setdefault(layer, Border({}, {})), side).setdefault(which, source)
        ir.convenience.replace_all_uses_with(output, source, replace_graph_outputs=True)
    return found
