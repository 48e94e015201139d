"""Targets: the formats a model is exported to, and the runtimes that read them.

To add one, add a file to this folder with one final subclass of `Target`; nothing else needs to be edited. It says what
it has no place for (`misfit`, `misplaced`), writes a folder (`write`), reads it back in its own runtime (`load`) and
states how exact that runtime is (`tolerance`). It is handed the trained model layer by layer (`trained.py`) and writes
codes and scales as `Weight.quantize` gives them; it never quantizes anything itself. `plain.py` is a short example.
"""

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from qlightning.export.inputs import Call
from qlightning.export.trained import Layer, Trained, Weight
from qlightning.tasks.architecture import nearest

CODES = "codes"
"""What is lost where a weight's values can be kept, in float on their grid, but not its codes."""


TRANSFORM = "transform"
"""The placement under which a target is asked for what a layer does with its input before all else."""


class Tolerance(NamedTuple):
    """How far the artifact may be from the trained model.

    Attributes:
        ulp: Largest difference in units in the last place, in any layer and at the outputs; None if only SQNR counts.
        sqnr: Smallest ratio of signal to difference at the outputs, dB; None if only ulp counts.
        layer_sqnr: The same for a layer that is given the trained model's inputs: one layer, not what rounding makes of
            small differences in all layers together.
        reason: Why it is not zero.
    """

    ulp: int | None = 0
    sqnr: float | None = None
    layer_sqnr: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.sqnr is None:
            limit = f"{self.ulp} ulp"
        else:
            limit = f"{self.sqnr:g} dB at the outputs, {self.layer_sqnr or self.sqnr:g} dB in a layer"
        return f"{limit} ({self.reason})" if self.reason else limit


EXACT = Tolerance()


class Plan(NamedTuple):
    """What an export will do with a trained model.

    Attributes:
        trained: The model.
        dtype: In which the artifact computes, and holds what is no code.
        dropped: What the user gave up, by placement, with the names of the layers where it is lost.
        in_float: Names of the weights whose values are kept in float on their grid.
        tokenizer: Folder of the tokenizer that goes with the model, or None; its files are copied to every artifact.
        adapters: Whether PEFT's adapters are written beside the model.
        example: A call of the model, for targets that trace it; None: they make one up.
    """

    trained: Trained
    dtype: torch.dtype
    dropped: dict[str, list[str]]
    in_float: frozenset[str]
    tokenizer: Path | None = None
    adapters: bool = False
    example: Call | None = None

    def packed(self) -> Iterator[Weight]:
        """The weights that are written as codes."""
        return (weight for weight in self.trained.weights if weight.name not in self.in_float)

    @property
    def untied(self) -> bool:
        """Whether a tied weight is written as codes under one of its names only, so that the other needs its values."""
        packed = {weight.name for weight in self.packed()}
        return any((name in packed) != (first in packed) for name, first in self.trained.tied().items())

    def dense(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of everything else, in the artifact's dtype, one at a time."""
        for weight in self.trained.weights:
            if weight.name in self.in_float:
                yield weight.name, weight.values(self.dtype)
        for name, tensor in self.trained.floats():
            yield name, tensor.to(self.dtype) if tensor.is_floating_point() else tensor


class Target(ABC):
    """A format and the runtime that reads it. The arguments of `__init__`, all with defaults, are its options.

    Attributes:
        name: What the user calls it.
        takes_adapters: Whether `load` gives a module of transformers, which PEFT puts adapters into.
    """

    name: ClassVar[str]
    takes_adapters: ClassVar[bool] = False

    def refuses(self, trained: Trained, dtype: torch.dtype) -> str | None:
        """Why the model cannot be written at all, or None."""
        return None

    @abstractmethod
    def misfit(self, weight: Weight, dtype: torch.dtype) -> str | None:
        """Why the target has no place for this weight's codes and scales, or None.

        Args:
            weight: A quantized weight; `weight.has_codes` may be False.
            dtype: In which the artifact is to compute.
        """

    @abstractmethod
    def misplaced(self, layer: Layer, placement: str, dtype: torch.dtype) -> str | None:
        """Why the target cannot quantize so at a placement that is no weight ("input", "kv_cache" ...), or None.

        Args:
            layer: The layer; `layer.activations[placement]` are its quantizers there.
            placement: The placement, or "transform" for `layer.transform`, without which nothing can be exported.
            dtype: In which the artifact is to compute.
        """

    @abstractmethod
    def write(self, plan: Plan, folder: Path) -> None:
        """Write all files of the artifact, streaming: at no time hold more than one layer besides the model."""

    @abstractmethod
    def load(self, folder: Path, trained: Trained) -> Callable[..., Any]:
        """The artifact in the target's own runtime, called as `trained.model` is.

        A module whose layers are named as the model's is compared layer by layer, anything else by its outputs.

        Args:
            folder: The artifact.
            trained: What it was made from, for its structure only.
        """

    def tolerance(self, plan: Plan) -> Tolerance:
        """How far the loaded artifact may be from the trained model: zero if the same values meet the same kernels."""
        return EXACT


def other_scales(weight: Weight, dtype: torch.dtype) -> str | None:
    """Why scales would be rounded in an artifact that keeps them in the dtype it computes in, or None."""
    if torch.promote_types(weight.scale_dtype, dtype) == dtype:  # a wider dtype holds them as they are
        return None
    have, want = (str(d).removeprefix("torch.") for d in (weight.scale_dtype, dtype))
    word = {"float32": "sfp32", "bfloat16": "sbf16", "float16": "sfp16"}.get(want, "sfp32")
    return (
        f"its scales are {have} and the artifact's {want}: train with scales that are rounded to that, as a spec such "
        f"as 'int4-g128-{word}' says, or leave dtype out"
    )


def targets() -> dict[str, type[Target]]:
    """Every target by name: those of the files in this folder, and whatever else subclasses `Target`."""
    package = import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        import_module(f"{__package__}.{module.name}")
    return {cls.name: cls for cls in sorted(Target.__subclasses__(), key=lambda cls: cls.name)}


def target_named(name: str) -> type[Target]:
    """The target of that name. Raises ValueError with the nearest one for an unknown name."""
    known = targets()
    if name not in known:
        raise ValueError(f"format {name!r} is not known{nearest(name, known)}; there are {', '.join(known)}")
    return known[name]


def make_plan(
    target: Target,
    trained: Trained,
    *,
    dtype: torch.dtype | None = None,
    drop: Iterable[str] = (),
    tokenizer: Path | None = None,
    adapters: bool = False,
) -> Plan:
    """Decide what is written as what.

    Args:
        target: Where to.
        trained: The model.
        dtype: In which the artifact computes; the trained model's own dtype when not given.
        drop: What may be lost: placements, or "codes" for weights that may be kept in float on their grid.
        tokenizer: Folder of the tokenizer that goes with the model.
        adapters: Whether the model has PEFT's adapters outside of its quantizers.

    Raises:
        ValueError: Something would be lost that `drop` does not name, or `drop` names what is not lost.
    """
    chosen = dtype or trained.dtype
    if reason := target.refuses(trained, chosen):
        raise ValueError(f"{target.name}: {reason}")
    if adapters:
        _check_adapters(target, trained)
    lost: dict[str, dict[str, str]] = {}
    for layer in trained.layers:
        if layer.transform is not None and (reason := target.misplaced(layer, TRANSFORM, chosen)):
            able = next(name for name, cls in targets().items() if cls().misplaced(layer, TRANSFORM, chosen) is None)
            raise ValueError(
                f"{target.name} has no place for {layer.transform!r}, the transform of the input of {layer.name}, "
                f"without which the layer's weights mean nothing: {reason}; write format={able!r} (--format {able}), "
                "whose artifacts compute it, or train without: Scheme('int4-g128', transform=None)"
            )
        for placement in layer.activations:
            if reason := target.misplaced(layer, placement, chosen):
                lost.setdefault(placement, {})[layer.name] = reason
        for weight in layer.weights:
            if reason := target.misfit(weight, chosen):
                lost.setdefault(CODES, {})[weight.name] = reason
    _check_drop(target.name, lost, list(drop))
    if len(lost.get(CODES, ())) == len(list(trained.weights)) > 0:
        (where, why), *_ = lost[CODES].items()
        raise ValueError(
            f"{target.name} has no place for any codes of this model ({where}: {why}); write format='plain'"
        )
    dropped = {what: list(where) for what, where in lost.items()}
    return Plan(trained, chosen, dropped, frozenset(dropped.get(CODES, ())), tokenizer, adapters)


def _check_adapters(target: Target, trained: Trained) -> None:
    if target.takes_adapters and trained.config is not None:
        return
    able = ", ".join(name for name, cls in targets().items() if cls.takes_adapters)
    raise ValueError(
        f"{target.name} has no place for PEFT's adapters outside of the quantizers, and weights with them merged would "
        "be on no grid: train with adapters inside, Scheme('int4-g128', adapter='peft'), or export a model of "
        f"transformers as one of {able}, which have the adapters beside the base"
    )


def _check_drop(name: str, lost: dict[str, dict[str, str]], drop: list[str]) -> None:
    if unknown := [what for what in drop if what not in lost]:
        has = f"what would be lost is {', '.join(lost)}" if lost else "nothing would be lost"
        raise ValueError(f"drop={unknown[0]!r}: {name} loses no such thing here; {has}")
    missing = [what for what in lost if what not in drop]
    if not missing:
        return
    shown = []
    for what in missing:
        (where, why), count = next(iter(lost[what].items())), len(lost[what])
        effect = "the weights stay on their grid, but in float: " if what == CODES else ""
        shown.append(f"{what} of {count} layer{'s' * (count > 1)}: {effect}{why} ({where})")
    listed = "\n  ".join(shown)
    accepted = [*drop, *missing]
    raise ValueError(
        f"{name} has no place for everything this model was trained with, and would lose\n  {listed}\n"
        f"write drop={accepted!r} (--drop {' --drop '.join(accepted)}) to accept that, or choose another format"
    )
