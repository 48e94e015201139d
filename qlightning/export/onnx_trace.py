"""The ONNX graph of a trained model: its own forward, traced by torch, with marks where its quantizers are.

The model that is traced is the trained one; nothing of it is copied or rewritten. For the time of the trace a weight's
quantizer is a node `qlightning::Stored` that names the weight, a static one of 8 bits without a zero point is
`QuantizeLinear` and `DequantizeLinear`, and every other one is traced operation by operation, which is its arithmetic.
`qlightning::Border` marks where the inputs and outputs of layers with quantized weights are.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlightning.export.inputs import Call
from qlightning.export.trained import Layer, Trained
from qlightning.export.verify import MAIN, output_tensors
from qlightning.layers.layer import SUFFIX
from qlightning.numerics.formats import Int, UInt
from qlightning.numerics.forward_quantizer import ForwardQuantizer, State
from qlightning.numerics.granularity import PerTensor
from qlightning.numerics.learned import EMA, Learned
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.rounding import Nearest
from qlightning.numerics.scales import AbsMax
from qlightning.numerics.tensor_quantizer import TensorQuantizer

DOMAIN = "qlightning"
STORED, BORDER = f"{DOMAIN}::Stored", f"{DOMAIN}::Border"

_BYTES = {Int(8): torch.int8, UInt(8): torch.uint8}


def arguments(model: nn.Module, call: Call) -> dict[str, Any]:
    """The arguments of a call of the model by name, those of a `*args` numbered."""
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(len(call.args) - len(names))]
        elif parameter.kind is not parameter.KEYWORD_ONLY and parameter.kind is not parameter.VAR_KEYWORD:
            names.append(parameter.name)
    return {**dict(zip(names, call.args, strict=False)), **call.kwargs}


def trace(trained: Trained, call: Call, *, opset: int, sizes: Mapping[str, int]) -> Any:
    """The model as an `onnx_ir.Model`, with marks.

    Inputs are the tensors of the call, by the names of the arguments; what is no tensor becomes a constant. Outputs are
    what `verify` compares. The first dimension of inputs is of any size ("batch"), and so is the second one of token
    ids and masks ("tokens"). Initializers are the model's own parameters, not copies.

    Args:
        trained: The model.
        call: An example of what it is called with.
        opset: Version of the operators.
        sizes: Fixed sizes of dimensions, by their names.

    Raises:
        ValueError: The call has no tensors or has them inside other arguments, or the model cannot be traced.
    """
    model, given = trained.model, arguments(trained.model, call)
    tensors = {name: _resized(x, sizes) for name, x in given.items() if isinstance(x, Tensor)}
    for name, value in given.items():
        if name not in tensors and output_tensors(value):
            raise ValueError(
                f"argument {name!r} is a {type(value).__name__} of tensors, which is no input of a graph: let forward "
                "take each of them"
            )
    if not tensors:
        raise ValueError("the model is called without a tensor: write data=[batch], or set self.example_input_array")
    made: list[str] = []
    served = _Served(model, call, given, list(tensors), made.append)
    dynamic = {name: dict.fromkeys(_free(x, sizes), torch.export.Dim.DYNAMIC) for name, x in tensors.items()}
    with torch.no_grad(), _marked(trained), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice of torch to its own developers, and deprecations of its own
        try:
            program = torch.export.export(
                served, tuple(tensors.values()), dynamic_shapes=(tuple(dynamic.values()),), strict=False
            )
            exported: Any = torch.onnx.export(
                program, dynamo=True, opset_version=opset, optimize=False, verbose=False, input_names=list(tensors)
            )
        except Exception as error:
            raise ValueError(_untraceable(model, error)) from error
    return _named(exported.model, tensors, made[0], sizes)


def _untraceable(model: nn.Module, error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return (
        f"torch.export cannot trace {type(model).__name__} ({type(error).__name__}: {first}); if it is tied to a size, "
        "write options={'batch': 1} (or {'batch': 1, 'tokens': 128}); format 'plain' takes any model"
    )


class _Served(nn.Module):
    """The model as a function from tensors to the tensors that it is made for; `note` is told what these are called."""

    def __init__(
        self, model: nn.Module, call: Call, given: Mapping[str, Any], names: list[str], note: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.model, self.call, self.given, self.names, self.note = model, call, given, names, note
        self.eval()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = {**self.given, **dict(zip(self.names, tensors, strict=True))}
        positional = [given.pop(name) for name in list(given)[: len(self.call.args)]]
        output = self.model(*positional, **given)
        self.note(next((key for key in MAIN if isinstance(output, Mapping) and key in output), "output"))
        return tuple(output_tensors(output))


def _free(x: Tensor, sizes: Mapping[str, int]) -> list[int]:
    """The dimensions of an input that are of any size."""
    return [i for i, name in enumerate(_dimensions(x)) if name not in sizes]


def _dimensions(x: Tensor) -> list[str]:
    """Names of the leading dimensions that may be of any size."""
    of_tokens = x.dim() == 2 and not x.is_floating_point()
    return ["batch", "tokens"] if of_tokens else ["batch"] if x.dim() else []


def _resized(x: Tensor, sizes: Mapping[str, int]) -> Tensor:
    """An example of the wanted sizes; what is to be free must not be of size 1, which torch takes as fixed."""
    for i, dimension in enumerate(_dimensions(x)):
        wanted = sizes.get(dimension, max(2, x.shape[i]))
        if wanted != x.shape[i]:
            index = torch.arange(wanted, device=x.device) % x.shape[i]
            x = x.index_select(i, index)
    return x


# --- marks ---


@contextmanager
def _marked(trained: Trained) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in trained.layers:
            for weight in layer.weights:
                _replace(stack, layer, weight.prefix, Stored(weight.name))
            for prefix, quantizer in list(layer.twin.quantizers()):
                if (linear := _linear(quantizer)) is not None:
                    _replace(stack, layer, prefix, linear)
            if layer.weights:
                _mark_borders(stack, layer)
        yield


def _replace(stack: ExitStack, layer: Layer, prefix: str, by: ForwardQuantizer) -> None:
    modules, name = layer.twin._modules, prefix + SUFFIX
    stack.callback(modules.__setitem__, name, modules[name])
    modules[name] = by


def _mark_borders(stack: ExitStack, layer: Layer) -> None:
    def before(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        marked = (_border(x, layer.name, "inputs", i) for i, x in enumerate(args))
        return tuple(marked), {name: _border(x, layer.name, "inputs", name) for name, x in kwargs.items()}

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        return _border(output, layer.name, "outputs", 0)

    for handle in (
        layer.twin.register_forward_pre_hook(before, with_kwargs=True),
        layer.twin.register_forward_hook(after),
    ):
        stack.callback(handle.remove)


def _border(x: Any, layer: str, side: str, which: int | str) -> Any:
    if not isinstance(x, Tensor):
        return x
    attributes: Any = {"layer": layer, "side": side, "which": str(which)}
    return torch.onnx.ops.symbolic(BORDER, (x,), attributes, dtype=x.dtype, shape=x.shape, version=1)


class _Mark(ForwardQuantizer):
    """A quantizer that only stands in the graph, which has no backward pass."""

    needs_input = recomputable = True

    def __init__(self) -> None:
        super().__init__()
        # of one scale for everything: no layer looks parts of the weight up before they are quantized
        self.granularity, self.scale, self.rounding = PerTensor(), AbsMax(), Nearest()

    def prepare(self, x: Tensor) -> State:
        return ()

    def bypass(self, x: Tensor) -> Tensor:
        return x


class Stored(_Mark):
    """A weight's quantizer in the graph: the node's output is the matrix that the artifact stores.

    Args:
        name: Name of the weight.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def values(self, x: Tensor, state: State, key: Tensor | None) -> Tensor:
        return torch.onnx.ops.symbolic(STORED, (x,), {"name": self.name}, dtype=x.dtype, shape=x.shape, version=1)


class Linear8(_Mark):
    """QuantizeLinear and DequantizeLinear with one constant scale and no zero point.

    Args:
        scale: float32 of one element.
        codes: int8 or uint8.
    """

    value: Tensor
    zero: Tensor

    def __init__(self, scale: Tensor, codes: torch.dtype) -> None:
        super().__init__()
        self.codes_as = codes
        self.register_buffer("value", scale.reshape(()).clone())
        self.register_buffer("zero", torch.zeros((), dtype=codes))

    def values(self, x: Tensor, state: State, key: Tensor | None) -> Tensor:
        by, shape = (self.value, self.zero), x.shape
        codes = torch.onnx.ops.symbolic("QuantizeLinear", (x, *by), dtype=self.codes_as, shape=shape, version=21)
        return torch.onnx.ops.symbolic("DequantizeLinear", (codes, *by), dtype=x.dtype, shape=shape, version=21)


def _linear(quantizer: TensorQuantizer) -> Linear8 | None:
    """The quantizer as the two operators, where they compute what it does.

    Not with a zero point: the operators add it to the rounded quotient, where what was trained rounds the sum.
    """
    if not isinstance(quantizer, Quantizer) or quantizer.transform is not None or not quantizer.enabled:
        return None
    codes = _BYTES.get(quantizer.format)
    simple = isinstance(quantizer.scale, EMA | Learned) and quantizer.granularity == PerTensor()
    if codes is None or not simple or quantizer.rounding.ties != "even":
        return None
    grid = quantizer.grid(torch.zeros(1, 1))
    return None if grid.inner is not None or grid.tensor_scale is not None else Linear8(grid.scale, codes)


# --- names ---


def _named(model: Any, tensors: Mapping[str, Tensor], makes: str, sizes: Mapping[str, int]) -> Any:
    """The graph with the state dict's names for its initializers and the model's for the rest."""
    for name in list(model.graph.initializers):
        model.graph.initializers[name].name = name.removeprefix("model.")
    symbols: dict[str, str] = {}
    for value, (name, x) in zip(model.graph.inputs, tensors.items(), strict=True):
        value.name = name
        for i in _free(x, sizes):
            symbols.setdefault(str(value.shape[i]), _dimensions(x)[i])
    makes = f"out_{makes}" if makes in tensors else makes
    for i, value in enumerate(model.graph.outputs):
        value.name = makes if len(model.graph.outputs) == 1 else f"{makes}_{i}"
    import onnx_ir as ir
    from onnx_ir.passes.common import NameFixPass

    NameFixPass()(model)

    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    for value in values:
        for i, size in enumerate(value.shape or ()):
            if str(size) in symbols:
                value.shape[i] = ir.SymbolicDim(symbols[str(size)])
    return model
