"""Bit annealing: the formats that quantizers take on later in a run, and the checks that they can.

Everything a later format needs exists from conversion on: it keeps the granularity and the kind of scale, so that a
switch of formats changes values only.
"""

import copy
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any, cast

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from qlightning.callbacks.loading import load_state_dict
from qlightning.callbacks.phases import Place, places
from qlightning.layers.convert import names_of_layers, quantizers_of
from qlightning.layers.coverage import kind_of
from qlightning.layers.rules import Rules, RuleValue
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.scales import Scale
from qlightning.numerics.spec import describe, rebuild, unparse
from qlightning.numerics.tensor_quantizer import TensorQuantizer, read_extra_state
from qlightning.solvers.fixed import Fixed

Stages = dict[str, Quantizer]
"""What quantizers become in one phase, by the name of their place."""


def plan_stages(
    module: nn.Module, rules: Mapping[str, RuleValue], later: Sequence[Mapping[str, RuleValue]]
) -> list[Stages]:
    """What every quantizer of a converted module becomes in each phase, and let checkpoints hold any of it.

    Args:
        module: A module converted by `rules`.
        rules: The rules of the run.
        later: The rules of each phase, which are laid over those before; empty where a phase has none.

    Raises:
        ValueError: A rule decides no layer, names a placement that stays in float, or a format that does not fit.
    """
    present, laid, planned = list(places(module)), dict(rules), []
    for new in later:
        laid |= new
        planned.append(_stages_of(present, Rules(laid).know(names_of_layers(module)), new) if new else {})
    _remember(present, planned)
    return planned


def _stages_of(present: Sequence[Place], laid: Rules, new: Mapping[str, RuleValue]) -> Stages:
    stages: Stages = {}
    used: set[tuple[str, str]] = set()
    for place in present:
        pattern, scheme = laid.decide(place.layer_name, kind_of(place.layer))
        wanted = dict(scheme.items()).get(place.placement) if scheme is not None and pattern in new else None
        if wanted is None:
            continue
        used.add((pattern, place.placement))
        stages[place.name] = _checked(place, pattern, wanted)
    for pattern in new:
        scheme = laid.schemes[pattern]
        for placement, _ in scheme.items() if scheme is not None else ():
            if (pattern, placement) not in used:
                raise ValueError(
                    f"rule {pattern!r} of a later phase gives a new {placement} format, but no layer it decides has a "
                    f"{placement} quantizer; quantizers exist from the start: give {pattern!r} one in "
                    f"QATCallback(rules=...), or leave {placement} out of the phase"
                )
    by_quantizer: dict[int, tuple[str, Quantizer]] = {}
    for place in present:
        name, stage = by_quantizer.setdefault(id(place.quantizer), (place.name, stages.get(place.name, _NONE)))
        if stage != stages.get(place.name, _NONE):
            raise ValueError(f"{name} and {place.name} share one quantizer: give both layers the same later format")
    return stages


_NONE: Any = None


def _checked(place: Place, pattern: str, wanted: TensorQuantizer) -> Quantizer:
    if not isinstance(wanted, Quantizer) or not isinstance(place.quantizer, Quantizer):
        raise ValueError(f"rule {pattern!r}: {place.name} is {place.quantizer!r}, whose format cannot change in a run")
    wanted = copy.deepcopy(wanted)
    if isinstance(place.quantizer.scale, Fixed) and not wanted.scale.static:
        wanted.scale = Fixed(wanted.scale)
    if place.observes and place.quantizer.scale.real_zero:
        raise ValueError(f"rule {pattern!r}: {place.name} observes a real zero, whose format cannot change in a run")
    try:
        copy.deepcopy(place.quantizer).become(wanted)
    except ValueError as error:
        shown = unparse(place.quantizer) or repr(place.quantizer)
        raise ValueError(
            f"rule {pattern!r} of a later phase: {place.name}: {error}; begin and go on with one granularity and kind "
            f"of scale, here those of {shown!r}, for example int8-g32 and then int4-g32"
        ) from None
    return wanted


def _remember(present: Sequence[Place], planned: Sequence[Stages]) -> None:
    for place in present:
        later = [stages[place.name] for stages in planned if place.name in stages]
        if isinstance(place.quantizer, Quantizer):
            first = rebuild(describe(place.quantizer))  # without state
            place.quantizer.stages = (first, *later) if later else ()


def enter_stages(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Let every quantizer be in the stage in which a state dict has it."""
    for name, quantizer in quantizers_of(module):
        key = f"{name}._extra_state"
        if key in state_dict:
            saved = rebuild(read_extra_state(state_dict[key])["quantizer"])
            if isinstance(saved, TensorQuantizer) and not quantizer.deploys_like(saved):
                quantizer.enter_stage_of(saved)


class AsConverted:
    """A context in which the quantizers of a module are what its rules made them, whatever the run has made of them.

    They are in their first stage, and scales that were fixed for a solver follow their weights.

    Raises:
        ValueError: On the way out, if the rules planned in the meantime do not know the stage a quantizer is in.
    """

    def __init__(self, module: nn.Module) -> None:
        self._later: list[tuple[Quantizer, Quantizer]] = []
        self._stages: list[tuple[Quantizer, Sequence[Quantizer]]] = []
        self._fixed: list[tuple[Quantizer, Fixed]] = []
        for _, quantizer in quantizers_of(module):
            if not isinstance(quantizer, Quantizer):
                continue
            if quantizer.stages and not quantizer.trains_like(quantizer.stages[0]):
                now = next(stage for stage in quantizer.stages if stage.trains_like(quantizer))
                self._later.append((quantizer, now))
                self._stages.append((quantizer, quantizer.stages))
            if isinstance(quantizer.scale, Fixed):
                self._fixed.append((quantizer, quantizer.scale))

    def __enter__(self) -> None:
        for quantizer, _ in self._later:
            quantizer.become(quantizer.stages[0])
        for quantizer, fixed in self._fixed:
            quantizer.scale = cast(Scale, fixed.source)

    def __exit__(self, *args: object) -> None:
        for quantizer, fixed in self._fixed:
            quantizer.scale = fixed
        for quantizer, now in self._later:
            quantizer.become(now)
        if unknown := [now for quantizer, now in self._later if not any(map(now.trains_like, quantizer.stages))]:
            for quantizer, stages in self._stages:
                quantizer.stages = stages
            raise ValueError(
                f"the module was annealed to {unparse(unknown[0]) or repr(unknown[0])!r}, of which these phases say "
                "nothing; call qlightning.restore(module) before another scheme or schedule"
            )


def load_in_stage(pl_module: LightningModule) -> MethodType:
    """A `load_state_dict` for one module that takes checkpoints of any stage."""
    return MethodType(_load_in_stage, pl_module)  # bound, so that a deep copy of the module has one of its own


def _load_in_stage(self: LightningModule, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    enter_stages(self, state_dict)
    return load_state_dict(self, state_dict, *args, **kwargs)
