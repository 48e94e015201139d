"""Train = deploy, proven: the trained model and the artifact in the runtime that serves it, on the same inputs."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlightning.export.inputs import Call, Inputs
from qlightning.export.target import CODES, Plan, Tolerance
from qlightning.export.trained import Trained


class Difference(NamedTuple):
    """How far the artifact is from the trained model at one place, over all inputs.

    Attributes:
        name: The layer, or "outputs".
        ulp: Largest number of representable values that lie between the two, in the coarser of their dtypes.
        largest: Largest absolute difference.
        sqnr: 10 log10 of signal power over power of the difference, dB; infinite where both are equal.
    """

    name: str
    ulp: int
    largest: float
    sqnr: float

    def within(self, tolerance: Tolerance) -> bool:
        """Whether it is tolerated. A difference that is not a number never is."""
        if math.isnan(self.largest) or math.isnan(self.sqnr):
            return False
        return (tolerance.ulp is None or self.ulp <= tolerance.ulp) and (
            tolerance.sqnr is None or self.sqnr >= tolerance.sqnr
        )


class Proof(NamedTuple):
    """The result of a comparison.

    Attributes:
        outputs: At the model's outputs.
        layers: At every converted layer; empty where the runtime has no layers to look at.
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
    def passed(self) -> bool:
        """Whether every difference is within the tolerance."""
        return all(difference.within(self.tolerance) for difference in (self.outputs, *self.layers))

    @property
    def worst(self) -> Difference:
        """The layer, or the outputs, where the artifact is furthest from the trained model."""
        return max((self.outputs, *self.layers), key=lambda d: (math.isnan(d.sqnr), -d.sqnr, d.ulp))

    def text(self) -> str:
        """The report."""
        lines = [f"train = deploy, on {self.inputs}"]
        if self.without:
            lines.append(f"without what was dropped: {', '.join(self.without)} (that alone: {_decibel(self.cost)})")
        lines.append(_line(self.outputs))
        if self.layers:
            equal = sum(d.ulp == 0 and d.largest == 0 for d in self.layers)
            lines.append(f"layers        {equal} of {len(self.layers)} equal bit for bit")
            lines += [_line(d) for d in sorted(self.layers, key=lambda d: d.sqnr)[:5] if d.largest != 0]
        else:
            lines.append("layers        not visible in this runtime")
        lines.append(f"tolerance     {self.tolerance}")
        lines.append("passed" if self.passed else f"FAILED at {self.worst.name}")
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
    names = [layer.name for layer in trained.layers]
    seen = names if _layers_of(runtime, names) else []
    gauges: dict[str, _Gauge] = {name: _Gauge() for name in seen}
    outputs, cost = _Gauge(), _Gauge()
    for call in inputs.calls:
        if dropped:
            whole = _tensors(trained.model(*call.args, **call.kwargs))
        with _without(trained, dropped), _watched(trained.model, seen) as ours:
            expected = _tensors(trained.model(*call.args, **call.kwargs))
        with _watched(runtime, seen) as theirs:
            actual = _tensors(_run(runtime, call, plan))
        if len(actual) != len(expected):
            raise ValueError(f"the artifact has {len(actual)} outputs, the trained model {len(expected)}")
        for one, other in zip(expected, actual, strict=True):
            outputs.add(one, other)
        for name in seen:
            for one, other in zip(ours[name], theirs[name], strict=True):
                gauges[name].add(one, other)
        if dropped:
            for one, other in zip(whole, expected, strict=True):
                cost.add(one, other)
    layers = [gauge.read(name) for name, gauge in gauges.items() if gauge.count]
    return Proof(
        outputs.read("outputs"), layers, tolerance, inputs.what, dropped, cost.read("").sqnr if dropped else None
    )


def _run(runtime: Callable[..., Any], call: Call, plan: Plan) -> Any:
    return runtime(
        *(_cast(x, plan.dtype) for x in call.args), **{k: _cast(x, plan.dtype) for k, x in call.kwargs.items()}
    )


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _layers_of(runtime: Callable[..., Any], names: Sequence[str]) -> bool:
    """Whether the runtime is a module with these layers."""
    return isinstance(runtime, nn.Module) and {name for name, _ in runtime.named_modules()} >= set(names)


@contextmanager
def _watched(model: Any, names: Sequence[str]) -> Iterator[Mapping[str, list[Tensor]]]:
    """The outputs of layers, call by call, by the names of the layers."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen[name].extend(_tensors(output))
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


def _tensors(output: Any) -> list[Tensor]:
    """The float tensors of a model's output; of a structured one, what it is made for."""
    if isinstance(output, Tensor):
        return [output.detach()] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        main = next((output[key] for key in ("logits", "sample", "last_hidden_state") if key in output), None)
        return _tensors(main) if main is not None else [t for value in output.values() for t in _tensors(value)]
    if isinstance(output, tuple | list):
        return [tensor for value in output for tensor in _tensors(value)]
    return []


class _Gauge:
    """Gathers the difference of pairs of tensors."""

    def __init__(self) -> None:
        self.count = self.ulp = 0
        self.largest = self.signal = self.noise = 0.0

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
        ratio = float("inf") if self.noise == 0 else 0.0 if self.signal == 0 else self.signal / self.noise
        sqnr = 10 * math.log10(ratio) if 0 < ratio < float("inf") else ratio if ratio else float("-inf")
        return Difference(name, self.ulp, self.largest, sqnr)


def _larger(a: float, b: float) -> float:
    return b if math.isnan(b) else max(a, b)


_INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def ulps(one: Tensor, other: Tensor) -> int:
    """Largest number of steps between two tensors along the representable values of the coarser dtype.

    >>> ulps(torch.tensor([1.0, -0.0]), torch.tensor([1.0 + 2**-23, 0.0]))
    1
    """
    dtype = min(one.dtype, other.dtype, key=lambda dtype: (torch.finfo(dtype).bits, -torch.finfo(dtype).eps))
    a, b = _ordered(one.to(dtype)), _ordered(other.to(dtype))
    return int((a - b).abs().max()) if one.numel() else 0


def _ordered(x: Tensor) -> Tensor:
    """int64 that count representable values in ascending order, both zeros at 0."""
    bits = x.contiguous().view(_INTEGERS[x.dtype]).to(torch.int64)
    lowest = -(2 ** (8 * x.element_size() - 1)) if x.element_size() < 8 else torch.iinfo(torch.int64).min
    return torch.where(bits < 0, lowest - bits, bits)
