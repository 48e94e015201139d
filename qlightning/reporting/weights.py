"""The facts of every quantized weight and activation of a model, one after the other."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlightning.callbacks.phases import places
from qlightning.callbacks.trajectory import settled_inputs
from qlightning.evaluation.sample import evenly
from qlightning.evaluation.size import Size, sizes
from qlightning.evaluation.sqnr import sqnr
from qlightning.layers.coverage import kind_of
from qlightning.numerics.spec import unparse
from qlightning.numerics.tensor_quantizer import TensorQuantizer
from qlightning.optim.weights import Weight, weights_in
from qlightning.reporting.histogram import Histogram, histogram_of

STEPS = 4096


class WeightFacts(NamedTuple):
    """One quantized weight.

    Attributes:
        name: Of the weight.
        kind: Name of its layer's plain class.
        spec: What quantizes it.
        shape: Output channels and fan-in.
        size: Its elements and bytes.
        acts: "acts", "not yet" (before its phase) or "released" (back in float for the rest of the run).
        sqnr: Signal to quantization error, dB; None where it has no grid yet.
        steps: At most 4096 of its step sizes, ascending.
        all_steps: How many there are.
        histogram: How its elements lie on the grid; None where it has no grid yet.
    """

    name: str
    kind: str
    spec: str
    shape: tuple[int, ...]
    size: Size
    acts: str
    sqnr: float | None
    steps: list[float]
    all_steps: int
    histogram: Histogram | None

    @property
    def bits(self) -> float:
        """Bits per element as it is served, scales and zero points included."""
        return 8 * self.size.served / self.size.elements


class InputFacts(NamedTuple):
    """One quantizer of activations.

    Attributes:
        name: Of the placement, "layers.0.q_proj.input".
        spec: What quantizes it.
        acts: As in `WeightFacts`.
        steps: Its step sizes where they are state, ascending; empty where every input has its own.
    """

    name: str
    spec: str
    acts: str
    steps: list[float]


@torch.no_grad()
def weight_facts(module: nn.Module) -> Iterator[WeightFacts]:
    """Every quantized weight of a converted module in eval mode, shared ones once."""
    size = sizes(module)
    for weight in weights_in(module):
        yield _facts(weight, size[id(weight.parameter)])


def _facts(weight: Weight, size: Size) -> WeightFacts:
    quantizer = weight.quantizer
    matrix = weight.matrix()
    known: dict[str, Any] = {"sqnr": None, "steps": [], "all_steps": 0, "histogram": None}
    if quantizer.ready and matrix.numel():
        state = weight.state(matrix)
        values = quantizer.on_grid(matrix, state, quantizer.rounding.key())
        steps = quantizer.steps(state)
        known["sqnr"] = sqnr(matrix, values)
        known["steps"], known["all_steps"] = ascending(steps), steps.numel()
        known["histogram"] = histogram_of(weight, matrix, state, values)
    return WeightFacts(
        weight.name, kind_of(weight.layer), spec_of(quantizer), tuple(matrix.shape), size, _acts(quantizer), **known
    )


def input_facts(module: Any) -> list[InputFacts]:
    """Every quantizer of a converted module that is none of a weight."""
    settled = {place.name: ascending(steps) for place, steps in settled_inputs(module)}
    return [
        InputFacts(place.name, spec_of(place.quantizer), _acts(place.quantizer), settled.get(place.name, []))
        for place in places(module)
        if not place.is_weight
    ]


def spec_of(quantizer: TensorQuantizer) -> str:
    """The words for a quantizer, or the call that builds it."""
    return unparse(quantizer) or repr(quantizer)


def ascending(steps: Tensor) -> list[float]:
    ranked: list[float] = evenly(steps.detach().float(), STEPS).sort().values.tolist()
    return ranked


def _acts(quantizer: TensorQuantizer) -> str:
    return "released" if quantizer.released else "acts" if quantizer.enabled else "not yet"
