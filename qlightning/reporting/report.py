"""The report: all facts of one model and its run."""

from typing import NamedTuple

from torch import nn

from qlightning.evaluation.size import sizes
from qlightning.reporting.run import Run
from qlightning.reporting.weights import InputFacts, WeightFacts, input_facts, weight_facts


class Part(NamedTuple):
    """A quantized weight, or what else a layer keeps in float.

    Attributes:
        name: Of the weight or the layer.
        elements: How many numbers it holds.
        trained: Bytes as it is trained.
        served: Bytes as it is served.
        weight: The facts of the quantized weight; None where it is float.
    """

    name: str
    elements: int
    trained: int
    served: int
    weight: WeightFacts | None

    @property
    def bits(self) -> float:
        """Bits per element as it is served, scales and zero points included."""
        return 8 * self.served / self.elements


class Report(NamedTuple):
    """What is shown.

    Attributes:
        run: Where the model comes from.
        parts: All of the model's parameters, in its order.
        weights: The quantized weights.
        inputs: Quantizers of activations.
    """

    run: Run
    parts: list[Part]
    weights: list[WeightFacts]
    inputs: list[InputFacts]

    @property
    def trained(self) -> int:
        """Bytes of the model as it is trained."""
        return sum(part.trained for part in self.parts)

    @property
    def served(self) -> int:
        """Bytes of the model as it is served."""
        return sum(part.served for part in self.parts)

    @property
    def quantized_share(self) -> float:
        """Share of all parameters that are quantized."""
        return sum(weight.size.elements for weight in self.weights) / max(1, sum(part.elements for part in self.parts))

    @property
    def worst(self) -> WeightFacts | None:
        """The weight with the lowest SQNR."""
        known = [weight for weight in self.weights if weight.sqnr is not None]
        return min(known, key=lambda weight: weight.sqnr or 0.0, default=None)


def report_on(module: nn.Module, run: Run) -> Report:
    """All facts of a converted module in eval mode; weights are read one after the other.

    Raises:
        ValueError: Nothing in it is quantized.
    """
    weights = list(weight_facts(module))
    inputs = input_facts(module)
    if not weights and not inputs:
        raise ValueError(
            f"nothing in {run.title} is quantized: report on what QATCallback trained, or `qlightning calibrate` wrote"
        )
    return Report(run, _parts(module, weights), weights, inputs)


def _parts(module: nn.Module, weights: list[WeightFacts]) -> list[Part]:
    quantized = {weight.size.name: weight for weight in weights}
    parts: dict[str, Part] = {}
    for size in sizes(module).values():
        weight = quantized.get(size.name)
        name = size.name.rpartition(".")[0] if weight is None else weight.name
        known = parts.get(name, Part(name, 0, 0, 0, weight))
        total = known.elements + size.elements, known.trained + size.trained, known.served + size.served
        parts[name] = Part(name, *total, weight)
    return [part for part in parts.values() if part.elements]
