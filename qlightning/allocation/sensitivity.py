"""Sensitivity: what the loss says when one layer alone is quantized, for every layer and candidate.

Layer-wise Calibration and Integer Programming (Hubara et al., ICML 2021, CalibTIP) measures so: one layer at a
candidate precision, all others as they are. What a layer costs is counted as it ships, scales and zero points included.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from qlightning.evaluation.modes import eval_mode, not_observing, quantizers_off
from qlightning.evaluation.random_state import random_state, restore_random_state
from qlightning.layers.convert import convert, quantizers_of, restore
from qlightning.layers.coverage import public_name
from qlightning.layers.layer import SUFFIX, Twin, twin_for
from qlightning.layers.scheme import Scheme, Spec
from qlightning.numerics.tensor_quantizer import TensorQuantizer

FLOAT_INPUT_BITS = 16
"""What a multiplication counts for an input that is not quantized."""


class Option(NamedTuple):
    """One layer at one candidate precision.

    Attributes:
        spec: The candidate, or None for float.
        increase: How much the loss rises when this layer alone is so; may be negative.
        bytes: Bytes of its weights: codes, scales and zero points.
        bit_operations: Its multiply-adds in one batch, each times bits of the weight times bits of the input.
    """

    spec: Spec | None
    increase: float
    bytes: int
    bit_operations: int


class Version(NamedTuple):
    """A weight at one candidate as something else than rounding to nearest has found it.

    Attributes:
        quantizer: The candidate, settled on it.
        parameters: The layer's own parameters by name.
    """

    quantizer: TensorQuantizer
    parameters: Mapping[str, Tensor]


Versions = Mapping[tuple[int, str], Version]
"""By the id of the layer and the prefix of the weight's quantizer."""


class _Unit(NamedTuple):
    """What can only have one precision: a layer, or layers that share a weight."""

    names: tuple[str, ...]
    places: tuple[tuple[Twin, str], ...]


def measure_sensitivity(
    module: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    *,
    candidates: Sequence[Spec | None],
    others: Literal["float", "quantized"] = "float",
    keep: Sequence[str] = (),
    versions: Sequence[Versions] | None = None,
) -> dict[tuple[str, ...], list[Option]]:
    """The options of every layer with a weight to quantize, measured one by one; the module is left as it was.

    Every evaluation runs in eval mode, without gradients and with the same random numbers. It takes layers times
    candidates passes over the batches.

    Args:
        module: A plain module, or a converted one, of which the quantized weights are taken.
        loss: The mean loss of a batch, (module, batch) -> scalar.
        batches: What the loss is measured on; read once and kept.
        candidates: Specs of weights, and None for float.
        others: What the other layers are: "float", or "quantized" as the (converted) module has them.
        keep: Patterns of layers that stay in float; of a plain module.
        versions: For each candidate, what takes the place of the layers' weights rounded to nearest.

    Returns:
        The options in the order of the candidates, by the names of the layer (several where layers share a weight).

    Raises:
        ValueError: There is nothing to measure, or a candidate does not fit a layer.
    """
    data = list(batches)
    if not data or not candidates:
        raise ValueError("nothing to measure: give batches and candidates, for example candidates=['int4', 'int8']")
    schemes = [Scheme(weight=spec).weight for spec in candidates]
    with ExitStack() as stack:
        if not any(True for _ in quantizers_of(module)):
            _convert(module, candidates, keep)
            stack.callback(restore, module)
            if others == "quantized":
                raise ValueError("others='quantized' is said of a converted module: convert(module, 'int8') first")
        elif keep:
            raise ValueError("keep is said of a plain module; a converted one keeps in float what its rules keep")
        stack.enter_context(_evaluating(module, others))
        units = list(_units(module))
        random = random_state()
        stack.callback(restore_random_state, random)

        def mean_loss() -> float:
            restore_random_state(random)
            return sum(float(loss(module, batch)) for batch in data) / len(data)

        macs = _count(module, units, lambda: loss(module, data[0]))
        base = mean_loss()
        return {
            unit.names: [
                _measure(unit, spec, prototype, macs[unit.names], lambda: mean_loss() - base, version)
                for spec, prototype, version in zip(candidates, schemes, versions or [{}] * len(schemes), strict=True)
            ]
            for unit in units
        }


def _convert(module: nn.Module, candidates: Sequence[Spec | None], keep: Sequence[str]) -> None:
    first = next((spec for spec in candidates if spec is not None), None)
    if first is None:
        raise ValueError("nothing to measure: every candidate is float")
    convert(module, {"*": first, **dict.fromkeys(keep)}, min_coverage=0.0)


@contextmanager
def _evaluating(module: nn.Module, others: Literal["float", "quantized"]) -> Iterator[None]:
    switched = not_observing if others == "quantized" else quantizers_off
    with eval_mode(module), switched(module), torch.no_grad():
        yield


def _units(module: nn.Module) -> Iterator[_Unit]:
    """Layers, put together where they share the quantizer of a weight."""
    layers: dict[str, Twin] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, Twin) and any(layer.quantizer(prefix) is not None for prefix in layer.weights()):
            layers[public_name(name)] = layer
    sharing: dict[int, list[str]] = {}
    for name, layer in layers.items():
        for prefix in layer.weights():
            if (quantizer := layer.quantizer(prefix)) is not None:
                sharing.setdefault(id(quantizer), []).append(name)
    seen: set[str] = set()
    for name in layers:
        if name in seen:
            continue
        names = sorted(
            {other for group in sharing.values() if name in group for other in group}, key=list(layers).index
        )
        seen |= set(names)
        places = [(layers[n], p) for n in names for p in layers[n].weights() if layers[n].quantizer(p) is not None]
        yield _Unit(tuple(names), tuple(places))


def _count(module: nn.Module, units: Sequence[_Unit], run: Callable[[], Any]) -> dict[tuple[str, ...], int]:
    """Multiply-adds times input bits of one run, by unit."""
    counted = {unit.names: 0 for unit in units}
    handles = []
    for unit in units:
        for layer in {id(layer): layer for layer, _ in unit.places}.values():
            twin, input_quantizer = twin_for(layer), layer.quantizer("input")
            assert twin is not None
            bits = FLOAT_INPUT_BITS if input_quantizer is None else input_quantizer.format.bits

            def count(
                layer: Any,
                inputs: Any,
                named: Any,
                output: Any,
                *,
                unit: _Unit = unit,
                twin: Any = twin,
                bits: int = bits,
            ) -> None:
                counted[unit.names] += bits * twin.multiply_adds(layer, (*inputs, *named.values()), output)

            handles.append(layer.register_forward_hook(count, with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return counted


def _measure(
    unit: _Unit,
    spec: Spec | None,
    prototype: TensorQuantizer | None,
    macs: int,
    increase: Callable[[], float],
    versions: Versions,
) -> Option:
    weights = {id(getattr(layer, prefix)): (layer, prefix) for layer, prefix in unit.places}.values()
    if prototype is None:
        sizes = [getattr(layer, prefix) for layer, prefix in weights]
        bits = max(8 * p.element_size() for p in sizes)
    else:
        bits = prototype.format.bits
    with _only(unit, prototype, versions) as built:
        risen = increase()
    stored = 0
    for layer, prefix in weights:
        parameter, quantizer = getattr(layer, prefix), built.get((id(layer), prefix))
        shape = tuple(layer.weights()[prefix].shape)
        whole = parameter.numel() * parameter.element_size()
        stored += whole if quantizer is None else quantizer.stored_bytes(shape, parameter.dtype)
    return Option(spec, risen, stored, macs * bits)


@contextmanager
def _only(
    unit: _Unit, prototype: TensorQuantizer | None, versions: Versions
) -> Iterator[dict[tuple[int, str], TensorQuantizer]]:
    """The unit's weights at a candidate precision, and back."""
    own = {(layer, prefix): layer.quantizer(prefix) for layer, prefix in unit.places}
    built: dict[tuple[int, str], TensorQuantizer] = {}
    before: list[tuple[Tensor, Tensor]] = []
    switches = {id(q): (q, q.enabled) for q in own.values() if q is not None}
    try:
        for layer, prefix in unit.places:
            if prototype is None:
                quantizer = own[layer, prefix]
                assert quantizer is not None
                quantizer.enabled = False
                continue
            version = versions.get((id(layer), prefix))
            if version is not None:
                before += [(p, p.detach().clone()) for p in layer._parameters.values() if p is not None]
                for name, value in version.parameters.items():
                    layer.get_parameter(name).detach().copy_(value)
            quantizer = _built(prototype, layer, prefix) if version is None else version.quantizer
            built[id(layer), prefix] = quantizer
            layer._modules[prefix + SUFFIX] = quantizer
        yield built
    finally:
        for parameter, value in reversed(before):
            parameter.detach().copy_(value)
        for (layer, prefix), quantizer in own.items():
            layer._modules[prefix + SUFFIX] = quantizer
        for quantizer, enabled in switches.values():
            quantizer.enabled = enabled


def _built(prototype: TensorQuantizer, layer: Twin, prefix: str) -> TensorQuantizer:
    matrix = layer.weights()[prefix].detach()
    inside = layer.inside()
    if inside is not None:
        matrix = inside.effective(matrix, inside.tensors())
    quantizer = copy.deepcopy(prototype)
    quantizer.build(tuple(matrix.shape))
    quantizer.to(matrix.device).eval()
    quantizer.initialize(matrix)
    quantizer.enabled = True
    return quantizer
