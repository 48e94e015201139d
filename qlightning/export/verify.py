"""Train = deploy, proven: the trained model and the artifact in the runtime that serves it, on the same inputs."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlightning.evaluation.sqnr import decibels
from qlightning.export.inputs import Call, Inputs
from qlightning.export.target import CODES, Plan, Tolerance
from qlightning.export.trained import Trained

MAIN = ("logits", "sample", "last_hidden_state")
"""What a model with a structured output is made for: the first of these that it has."""


class Difference(NamedTuple):
    """How far the artifact is from the trained model at one place, over all inputs.

    Attributes:
        name: The layer, or "outputs".
        ulp: Largest difference in units in the last place of the largest value (see `ulps`).
        largest: Largest absolute difference.
        sqnr: 10 log10 of signal power over power of the difference, dB; infinite where both are equal.
    """

    name: str
    ulp: int
    largest: float
    sqnr: float

    def within(self, ulp: int | None, sqnr: float | None) -> bool:
        """Whether it is tolerated. A difference that is not a number never is."""
        if math.isnan(self.largest) or math.isnan(self.sqnr):
            return False
        return (ulp is None or self.ulp <= ulp) and (sqnr is None or self.sqnr >= sqnr)


class Proof(NamedTuple):
    """The result of a comparison.

    Attributes:
        outputs: At the model's outputs.
        layers: At every layer with quantized weights, given the trained model's inputs; empty where the runtime has no
            layers to look at.
        tolerance: What the target states.
        inputs: What was run through both.
        without: Placements of the trained model that were switched off, because the export dropped them.
        cost: SQNR in dB of the trained model without what was dropped against the whole; None where nothing was.
    """

    outputs: Difference
    layers: list[Difference]
    tolerance: Tolerance
    inputs: str
    without: list[str]
    cost: float | None

    @property
    def failures(self) -> list[Difference]:
        """Where the difference is not within the tolerance, the worst first."""
        ulp, at_outputs, in_layers, _ = self.tolerance
        in_layers = at_outputs if in_layers is None else in_layers
        found = [layer for layer in self.layers if not layer.within(ulp, in_layers)]
        found += [] if self.outputs.within(ulp, at_outputs) else [self.outputs]
        return sorted(found, key=lambda d: (not math.isnan(d.sqnr), d.sqnr))

    @property
    def passed(self) -> bool:
        """Whether every difference is within the tolerance."""
        return not self.failures

    def text(self) -> str:
        """The report."""
        lines = [f"train = deploy, on {self.inputs}"]
        if self.without:
            lines.append(f"without what was dropped: {', '.join(self.without)} (that alone: {_decibel(self.cost)})")
        lines.append(_line(self.outputs))
        if self.layers:
            equal = sum(d.ulp == 0 and d.largest == 0 for d in self.layers)
            lines.append(f"layers        {equal} of {len(self.layers)} equal bit for bit on the trained model's inputs")
            lines += [_line(d) for d in sorted(self.layers, key=lambda d: d.sqnr)[:5] if d.largest != 0]
        else:
            lines.append("layers        not visible in this runtime")
        lines.append(f"tolerance     {self.tolerance}")
        lines.append("passed" if self.passed else f"FAILED at {', '.join(d.name for d in self.failures[:5])}")
        return "\n".join(lines)

    def plain(self) -> dict[str, Any]:
        """As plain values for JSON, in which infinity is null."""

        def values(difference: Difference) -> dict[str, Any]:
            return {
                **{"ulp": difference.ulp, "largest": difference.largest},
                "sqnr_db": difference.sqnr if math.isfinite(difference.sqnr) else None,
            }

        return {
            **{"passed": self.passed, "inputs": self.inputs, "tolerance": str(self.tolerance), "without": self.without},
            "outputs": values(self.outputs),
            "layers": {difference.name: values(difference) for difference in self.layers},
        }


def _line(difference: Difference) -> str:
    name, ulp, largest, sqnr = difference
    return f"{name:<13} largest difference {ulp} ulp ({largest:.3g}), SQNR {_decibel(sqnr)}"


def _decibel(sqnr: float | None) -> str:
    return "equal" if sqnr is None or sqnr == float("inf") else f"{sqnr:.1f} dB"


@torch.no_grad()
def compare(plan: Plan, runtime: Callable[..., Any], inputs: Inputs, tolerance: Tolerance) -> Proof:
    """Run the inputs through the trained model and through the artifact, and compare every layer and the outputs.

    Args:
        plan: What was exported; placements it dropped are switched off in the trained model for the time.
        runtime: The artifact, called as the model is.
        inputs: What to run.
        tolerance: What the target states.
    """
    trained, dropped = plan.trained, [what for what in plan.dropped if what != CODES]
    if isinstance(runtime, nn.Module):
        runtime.requires_grad_(False)  # as it is served: torch chooses kernels by whether weights need gradients
    names = _comparable(trained, runtime)
    gauges, outputs, cost = {name: _Gauge() for name in names}, _Gauge(), _Gauge()
    for call in inputs.calls:
        whole = output_tensors(trained.model(*call.args, **call.kwargs)) if dropped else []
        with _without(trained, dropped), _watched(trained.model, names) as calls:
            expected = output_tensors(trained.model(*call.args, **call.kwargs))
        outputs.add_all(expected, output_tensors(run(runtime, call, plan.dtype)))
        if dropped:
            cost.add_all(whole, expected)
        for name, (layer_call, output) in calls:
            assert isinstance(runtime, nn.Module)
            theirs = run(runtime.get_submodule(name), layer_call, plan.dtype)
            gauges[name].add_all(output, output_tensors(theirs))
    layers = [gauge.read(name) for name, gauge in gauges.items() if gauge.count]
    lost = cost.read("").sqnr if dropped else None
    return Proof(outputs.read("outputs"), layers, tolerance, inputs.what, dropped, lost)


def run(runtime: Callable[..., Any], call: Call, dtype: torch.dtype) -> Any:
    """Call the artifact, with floats in its dtype."""
    args = (_cast(x, dtype) for x in call.args)
    return runtime(*args, **{name: _cast(x, dtype) for name, x in call.kwargs.items()})


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _comparable(trained: Trained, runtime: Callable[..., Any]) -> list[str]:
    """Names of the layers with quantized weights, where the runtime is a module that has them, too."""
    names = [layer.name for layer in trained.layers if layer.weights]
    same = isinstance(runtime, nn.Module) and {name for name, _ in runtime.named_modules()} >= set(names)
    return names if same else []


@contextmanager
def _watched(model: Any, names: Sequence[str]) -> Iterator[list[tuple[str, tuple[Call, list[Tensor]]]]]:
    """(name, (arguments, outputs)) of every call of the layers of these names."""
    seen: list[tuple[str, tuple[Call, list[Tensor]]]] = []

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append((name, (Call(args, dict(kwargs)), output_tensors(output))))

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, kwargs, output, name=name: note(name, args, kwargs, output), with_kwargs=True
        )
        for name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without(trained: Trained, placements: Sequence[str]) -> Iterator[None]:
    """The trained model with the quantizers at some placements switched off."""
    off = [
        quantizer
        for layer in trained.layers
        for placement, quantizers in layer.activations.items()
        if placement in placements
        for quantizer in quantizers
    ]
    for quantizer in off:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer in off:
            quantizer.enabled = True


def output_tensors(output: Any) -> list[Tensor]:
    """The float tensors of a model's output; of a structured one, what it is made for."""
    if isinstance(output, Tensor):
        return [output.detach()] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        main = next((output[key] for key in MAIN if key in output), None)
        return output_tensors(list(output.values()) if main is None else main)
    if isinstance(output, tuple | list):
        return [tensor for value in output for tensor in output_tensors(value)]
    return []


class _Gauge:
    """Gathers the difference of pairs of tensors."""

    def __init__(self) -> None:
        self.count = self.ulp = 0
        self.largest = self.signal = self.noise = 0.0

    def add_all(self, ones: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        if len(ones) != len(others):
            raise ValueError(f"the artifact has {len(others)} outputs, the trained model {len(ones)}")
        for one, other in zip(ones, others, strict=True):
            self.add(one, other)

    def add(self, one: Tensor, other: Tensor) -> None:
        if one.shape != other.shape:
            raise ValueError(
                f"the artifact's output has shape {tuple(other.shape)}, the trained model's {tuple(one.shape)}"
            )
        self.count += one.numel()
        if not one.numel():
            return
        self.ulp = max(self.ulp, ulps(one, other))
        difference = (one.double() - other.double()).abs()
        self.largest = _larger(self.largest, float(difference.max()))
        self.signal += float(one.double().square().sum())
        self.noise += float(difference.square().sum())

    def read(self, name: str) -> Difference:
        return Difference(name, self.ulp, self.largest, decibels(self.signal, self.noise))


def _larger(a: float, b: float) -> float:
    return b if math.isnan(b) else max(a, b)


def ulps(one: Tensor, other: Tensor) -> int:
    """The largest difference in units in the last place of the largest value, rounded up: 0 means equal.

    The unit is that of the coarser of the two dtypes. It is the largest value's and not each value's own, for which a
    change of sign next to zero would count as billions.

    >>> ulps(torch.tensor([1.0, 0.0]), torch.tensor([1.0 + 2**-23, -1e-9]))
    1
    """
    largest = float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
    if not largest or math.isnan(largest):
        return 0
    epsilon = max(torch.finfo(one.dtype).eps, torch.finfo(other.dtype).eps)
    _, exponent = math.frexp(float(one.double().abs().max()))
    unit = math.ldexp(epsilon, exponent - 1)
    return math.ceil(largest / unit) if math.isfinite(largest) and unit > 0 else sys.maxsize
