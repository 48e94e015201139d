"""Quantized stand-ins for weights that a plain layer's own forward reads.

Where the arithmetic of a layer is not ours to write (fused experts, multi-head attention), its own forward runs with
quantized weights in the place of its parameters. What that forward would keep of them for backward is not kept:
saved-tensor hooks recognise the quantized copies and recompute them from the live weight.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from qlightning.layers.coverage import kind_of
from qlightning.layers.layer import Twin
from qlightning.numerics.autograd import keep_in_graph
from qlightning.numerics.tensor_quantizer import State, TensorQuantizer

T = TypeVar("T")


class Layout(NamedTuple):
    """How a weight is seen as the matrix (output channels, fan-in).

    Attributes:
        matrix: The weight as that matrix.
        unmatrix: Such a matrix in the shape of a weight: (matrix, weight) -> like weight.
    """

    matrix: Callable[[Tensor], Tensor]
    unmatrix: Callable[[Tensor, Tensor], Tensor]


_NO_PARAMETER = (
    "{name} of {owner} was parametrized after conversion (PEFT's target_parameters does so), and its quantizer cannot "
    "see the new weight: adapt other layers, LoraConfig(target_modules=[...]), or leave this one in float, "
    "rules={{'type:{owner}': None}}"
)

AS_IT_IS = Layout(lambda weight: weight, lambda matrix, weight: matrix)


class StandIn(NamedTuple):
    """The place of one weight.

    Attributes:
        owner: The module that reads it.
        name: As which attribute it reads it.
        quantizer: What it is to be quantized with.
        layout: How the quantizer sees it.
    """

    owner: nn.Module
    name: str
    quantizer: TensorQuantizer
    layout: Layout


def stand_ins(layer: Twin, names: Iterable[str], layout: Layout) -> list[StandIn]:
    """The places of those of a layer's own weights that have a quantizer."""
    return [StandIn(layer, name, q, layout) for name in names if (q := layer.quantizer(name)) is not None]


def with_stand_ins(places: Sequence[StandIn], call: Callable[[], T]) -> T:
    """`call()`, during which every `owner.name` is the quantized weight.

    The parameters stay where they are: an attribute of the instance goes before a registered parameter.

    Raises:
        ValueError: A weight is no parameter of its owner any more.
    """
    recipes: dict[int, _Recipe] = {}
    kept: list[Tensor] = []  # alive during the call, so that no other tensor can take a quantized copy's address
    try:
        for owner, name, quantizer, layout in places:
            weight = owner._parameters.get(name)
            if weight is None:
                raise ValueError(_NO_PARAMETER.format(name=name, owner=kind_of(owner)))
            quantized, recipe = _quantized(weight, quantizer, layout)
            owner.__dict__[name] = quantized
            kept.append(quantized)
            address = 0 if recipe is None else quantized.untyped_storage().data_ptr()
            if recipe is not None and address:
                recipes[address] = recipe
        if not recipes:
            return call()
        with _recomputing(recipes):
            return call()
    finally:
        for place in places:
            place.owner.__dict__.pop(place.name, None)


def _quantized(weight: Tensor, quantizer: TensorQuantizer, layout: Layout) -> tuple[Tensor, "_Recipe | None"]:
    if not quantizer.acts or weight.numel() == 0:
        return keep_in_graph(weight, *quantizer.learned()), None
    grid, key = quantizer.prepare(layout.matrix(weight)), quantizer.rounding.key()
    static = (quantizer, layout)
    quantized: Tensor = _Quantize.apply(weight, static, key, *grid)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return quantized, None  # a compiler decides by itself what to keep and what to recompute
    kept_grid = None if quantizer.recomputable else grid
    return quantized, _Recipe(weight.detach(), kept_grid, key, static)


def _values(weight: Tensor, state: State | None, key: Tensor | None, static: tuple[TensorQuantizer, Layout]) -> Tensor:
    quantizer, layout = static
    matrix = layout.matrix(weight)
    return layout.unmatrix(quantizer.values(matrix, quantizer.grid(matrix) if state is None else state, key), weight)


class _Quantize(torch.autograd.Function):
    """The quantized weight; nothing but the weight itself is saved for its gradient."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, static: tuple[TensorQuantizer, Layout], key: Tensor | None, *state: Tensor | None
    ) -> Tensor:
        ctx.static = static
        ctx.save_for_backward(weight, key, *(() if static[0].recomputable else state))
        return _values(weight, state, key, static)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        quantizer, layout = ctx.static
        weight, key, *state = ctx.saved_tensors
        matrix = layout.matrix(weight)
        rows, *grads = quantizer.gradients(
            layout.matrix(grad), matrix, tuple(state) or quantizer.grid(matrix), key, ctx.needs_input_grad[3:]
        )
        return layout.unmatrix(rows, weight), None, None, *grads


class _Recipe:
    """How to make a quantized weight once more. The result is kept until all that were saved of it are asked back."""

    def __init__(
        self, weight: Tensor, state: State | None, key: Tensor | None, static: tuple[TensorQuantizer, Layout]
    ) -> None:
        self.weight, self.state, self.key, self.static = weight, state, key, static
        self.version = weight._version
        self.saved = self.returned = 0
        self.made: Tensor | None = None

    def make(self) -> Tensor:
        if self.weight._version != self.version:
            raise RuntimeError("a quantized weight was changed in place between its forward and its backward pass")
        if self.made is None:
            with torch.no_grad():
                self.made = _values(self.weight, self.state, self.key, self.static)
        made = self.made
        self.returned += 1
        if self.returned % self.saved == 0:
            self.made = None
        return made


class _View(NamedTuple):
    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


def _recomputing(recipes: dict[int, _Recipe]) -> torch.autograd.graph.saved_tensors_hooks:
    """Hooks under which views of the quantized weights are saved as their recipes, and all else as it would be."""
    # Only the innermost hooks act, so those outside (activation checkpointing, save_on_cpu) are called from here.
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    outer_pack, outer_unpack = (_itself, _itself) if outer is None else outer[:2]

    def pack(tensor: Tensor) -> Any:
        recipe = recipes.get(tensor.untyped_storage().data_ptr()) if tensor.layout == torch.strided else None
        if recipe is None:
            return outer_pack(tensor)
        recipe.saved += 1
        return _View(recipe, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, _View):
            return packed.recipe.make().as_strided(packed.size, packed.stride, packed.offset)
        restored: Tensor = outer_unpack(packed)
        return restored

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _itself(packed: Any) -> Any:
    return packed
