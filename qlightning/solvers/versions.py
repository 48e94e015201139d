"""Versions of a model's weights: what a solver finds for each of several candidates, and the model left as it was."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlightning.allocation.sensitivity import Version, Versions
from qlightning.capture import Forward, run_step
from qlightning.layers.convert import quantizers_of
from qlightning.layers.layer import SUFFIX, Twin
from qlightning.numerics.learned import Static
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.tensor_quantizer import TensorQuantizer
from qlightning.solvers.engine import calibrate
from qlightning.solvers.fixed import settle_on
from qlightning.solvers.solver import Solver


def solve_versions(
    module: nn.Module,
    batches: Iterable[Any],
    solver: Solver,
    candidates: Sequence[Quantizer],
    *,
    forward: Forward = run_step,
) -> list[Versions]:
    """Every weight of a converted module as a solver finds it when all are at one candidate, for each candidate.

    Args:
        module: Converted, its weights' quantizers able to become each candidate, with scales that are state.
        batches: Calibration data.
        solver: One that changes the layers' own parameters alone (`AdaQuant()`, `GPTQ()`, ...).
        candidates: What the weights' quantizers become.
        forward: Runs the module on a batch.

    Raises:
        ValueError: A candidate's scale follows the weight, or the solver changes other parameters too.
    """
    check_static(candidates)
    data, found = list(batches), list[Versions]()
    for candidate in candidates:
        with _as_it_was(module), _becoming(module, candidate) as places:
            before = {name: p.detach().clone() for name, p in module.named_parameters()}
            calibrate(module, data, solver, forward=forward)
            own = {id(p) for layer, _ in places for p in (*layer._parameters.values(), *_learned(layer))}
            for name, parameter in module.named_parameters():
                if id(parameter) not in own and not torch.equal(parameter, before[name]):
                    raise ValueError(
                        f"{solver!r} changes {name}, and versions are chosen layer by layer: take a solver that leaves "
                        "everything else alone, for example AdaQuant()"
                    )
            found.append({(id(layer), prefix): _version(layer, prefix) for layer, prefix in places})
    return found


def check_static(candidates: Sequence[Quantizer]) -> None:
    """Raise ValueError where a solution would lie on no grid, because the candidate's scale follows the weight."""
    for candidate in candidates:
        if not isinstance(candidate.scale, Static):
            raise ValueError(
                f"a solver's weights lie on a grid that stays, and that of {candidate!r} follows the weight: write "
                "candidates with learned scales, for example 'int4-channel-asym-learned'"
            )


@torch.no_grad()
def take_version(layer: Twin, prefix: str, version: Version) -> None:
    """Let a layer, whose quantizer is at the version's candidate, be that version."""
    for name, value in version.parameters.items():
        layer.get_parameter(name).detach().copy_(value)
    quantizer, found = layer.quantizer(prefix), version.quantizer
    assert isinstance(quantizer, Quantizer)
    assert isinstance(quantizer.scale, Static)
    settle_on(quantizer.scale, found.grid(layer.effective(prefix)), quantizer.format)  # type: ignore[arg-type]


def _learned(layer: Twin) -> list[Tensor]:
    return [p for _, quantizer in layer.quantizers() for p in quantizer.parameters()]


def _version(layer: Twin, prefix: str) -> Version:
    quantizer = layer.quantizer(prefix)
    assert quantizer is not None
    return Version(quantizer, {name: p.detach().clone() for name, p in layer._parameters.items() if p is not None})


@contextmanager
def _becoming(module: nn.Module, candidate: Quantizer) -> Iterator[list[tuple[Twin, str]]]:
    """Every weight has a quantizer of its own that is the candidate, settled on the weight; and its own one back."""
    places = [
        (layer, prefix)
        for layer in module.modules()
        if isinstance(layer, Twin)
        for prefix in layer.weights()
        if layer.quantizer(prefix) is not None
    ]
    own: dict[tuple[int, str], TensorQuantizer] = {(id(m), p): m._modules[p + SUFFIX] for m, p in places}  # type: ignore[misc]
    copies = {id(quantizer): copy.deepcopy(quantizer) for quantizer in own.values()}
    try:
        for layer, prefix in places:
            quantizer: Any = copies[id(own[id(layer), prefix])]
            layer._modules[prefix + SUFFIX] = quantizer
            if not quantizer.deploys_like(candidate):
                quantizer.become(candidate)
            quantizer.initialize(layer.effective(prefix))
        yield places
    finally:
        for layer, prefix in places:
            layer._modules[prefix + SUFFIX] = own[id(layer), prefix]


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """Parameters, and the state of every quantizer that the module has now."""
    parameters = [(p, p.detach().clone()) for p in module.parameters()]
    states = [(quantizer, copy.deepcopy(quantizer.state_dict())) for _, quantizer in quantizers_of(module)]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in parameters:
                parameter.copy_(value)
        for quantizer, state in states:
            quantizer.load_state_dict(state)
