"""What every quantized layer shares: it is the plain layer, with quantizers beside its own parameters.

A layer is converted by changing its class, so its Parameter objects, their names, its hooks and whatever else refers to
it stay as they are. The new class is the twin's forward on top of the layer's own class, which may be any that the twin
accepts. Adding a twin is adding one file; `twins` finds it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlightning.adapters.adapter import Adapter
from qlightning.adapters.inside import Inside
from qlightning.layers.backward import Backward
from qlightning.layers.on_codes import OnCodes
from qlightning.numerics.layer_part import LayerPart
from qlightning.numerics.learned import Static
from qlightning.numerics.tensor_quantizer import TensorQuantizer
from qlightning.numerics.transform import Transform

SUFFIX = "_quantizer"
PLACES = ("transform", "adapter", "backward", "product")


class Twin(nn.Module, ABC):
    """A quantized twin of a plain layer.

    Attributes:
        placements: The placements of a Scheme that this twin has a place for, with the prefixes of their quantizers'
            names ("weight": those of `weights`). Empty for a layer that must only know that layers in it are converted.
        places: Which parts beside quantizers it has a place for, of `PLACES`.
        by_default: Whether the rule "*" converts such layers, or only a rule that names them.
        whole: Whether modules inside it are parts of it and no layers of their own.
        shows: Whether the class of a converted layer is named otherwise than the plain one, which some libraries write
            into their files.
    """

    placements: ClassVar[Mapping[str, tuple[str, ...]]] = {"weight": (), "input": ("input",), "output": ("output",)}
    places: ClassVar[tuple[str, ...]] = ()
    by_default: ClassVar[bool] = True
    whole: ClassVar[bool] = False
    shows: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether `module` is a plain layer that this twin stands in for."""

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Why an accepted layer cannot be converted all the same, or None."""
        return None

    @classmethod
    def surrounds(cls, module: nn.Module) -> bool:
        """Whether an accepted layer without placements must know what was converted inside it."""
        return any(isinstance(inner, Twin) for inner in module.modules())

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain layer's forward, with quantized operands."""

    @abstractmethod
    def weights(self) -> Mapping[str, Tensor]:
        """The weights that are quantized, as matrices (output channels, fan-in), by the prefix of their quantizer."""

    def laid_out(self, matrix: Tensor) -> Tensor:
        """A matrix (output channels, fan-in) in the shape of the weight, where there is a place for an adapter."""
        raise NotImplementedError(f"{type(self).__name__} has no place for an adapter")

    def prefixes(self, placement: str) -> tuple[str, ...]:
        """Prefixes of the names of the quantizers at a placement."""
        return tuple(self.weights()) if placement == "weight" else self.placements[placement]

    def features(self) -> int:
        """Size of the input's last dimension as quantizers see it, -1 when unknown."""
        return -1

    def output_features(self) -> int:
        """As `features`, of the output."""
        return -1

    @staticmethod
    def multiply_adds(module: nn.Module, inputs: Any, output: Any) -> int:
        """Multiply-adds of one call of the (plain or converted) layer; 0 where there are none."""
        return 0

    def on_converted(self) -> None:
        """Called once the quantizers are in place, or what is inside it is converted."""

    def on_restored(self) -> None:
        """Called before the quantizers are taken away."""

    def quantizers(self) -> Iterator[tuple[str, TensorQuantizer]]:
        """(name without the suffix, quantizer) of every quantizer of this layer itself."""
        for name, child in self.named_children():
            if isinstance(child, TensorQuantizer):
                yield name.removesuffix(SUFFIX), child

    def quantizer(self, name: str) -> TensorQuantizer | None:
        """The quantizer of that name, or None where this placement stays in float."""
        return self._modules.get(name + SUFFIX)  # type: ignore[return-value]

    def parts(self) -> Iterator[LayerPart]:
        """What the layer has beside quantizers."""
        for place in PLACES:
            part = self._modules.get(place)
            if isinstance(part, LayerPart):
                yield part

    def transformed(self, x: Tensor) -> Tensor:
        """The input as its quantizer sees it."""
        transform = self._modules.get("transform")
        return transform(x) if isinstance(transform, Transform) else x

    def inside(self) -> Inside | None:
        """The adapter inside the weight's quantizer, or None."""
        adapter = self._modules.get("adapter")
        return adapter.inside() if isinstance(adapter, Adapter) and adapter.acting else None

    @torch.no_grad()
    def effective(self, prefix: str) -> Tensor:
        """What the quantizer of a weight sees: its matrix, with the adapter that is inside the quantizer."""
        matrix, inside = self.weights()[prefix].detach(), self.inside()
        return matrix if inside is None else inside.effective(matrix, inside.tensors())

    def backward_part(self) -> Backward | None:
        """What the operands of its backward pass are quantized with, or None."""
        part = self._modules.get("backward")
        return part if isinstance(part, Backward) else None

    def on_codes(self) -> OnCodes | None:
        """What multiplies codes in the place of values, or None."""
        part = self._modules.get("product")
        return part if isinstance(part, OnCodes) else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As the plain layer's. Scales that are state follow the weights of a checkpoint that has none of its own."""
        if isinstance(adapter := self._modules.get("adapter"), Adapter):
            adapter.on_loading(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not any(key.startswith(prefix) for key in state_dict):
            return
        for name, child in self.named_children():  # parts whose weights are this layer's
            if not isinstance(child, TensorQuantizer | LayerPart):
                child._load_from_state_dict(state_dict, f"{prefix}{name}.", {}, False, [], [], [])
        weights = self.weights()
        for name, quantizer in self.quantizers():
            described = any(key.startswith(f"{prefix}{name}{SUFFIX}.") for key in state_dict)
            if isinstance(quantizer.scale, Static) and name in weights and not described:
                with torch.no_grad():
                    quantizer.initialize(self.effective(name))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by twin and plain class, since the class of a converted layer is made when it is converted."""
        if type(self) not in _plain_of:  # somebody's further subclass, who pickles it or forbids it
            return super().__reduce_ex__(protocol)
        return _revive, (_twin_of[type(self)], _plain_of[type(self)]), self.__getstate__()  # type: ignore[attr-defined]


_converted: dict[tuple[type[Twin], type[nn.Module]], type[Twin]] = {}
_plain_of: dict[type[nn.Module], type[nn.Module]] = {}
_twin_of: dict[type[nn.Module], type[Twin]] = {}


def converted_class(twin: type[Twin], plain: type[nn.Module]) -> type[Twin]:
    """The class of a converted layer: the twin's forward on top of the plain class."""
    if (twin, plain) not in _converted:
        name = f"Quant{plain.__name__}" if twin.shows else plain.__name__
        cls = type(name, (twin, plain), {"__module__": twin.__module__, "__doc__": twin.__doc__})
        _converted[twin, plain], _plain_of[cls], _twin_of[cls] = cls, plain, twin
    return _converted[twin, plain]


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class a converted layer had before."""
    known = _plain_of.get(type(module))  # not there for a class that somebody put on top, as FSDP does
    return known or next(_plain_of[cls] for cls in type(module).__mro__ if cls in _plain_of)


def restore_layer(layer: Twin) -> None:
    """Turn a converted layer back into the plain layer it was.

    Raises:
        ValueError: Somebody has put a class of their own on top, as FSDP does.
    """
    if type(layer) not in _plain_of:
        raise ValueError(f"a {type(layer).__name__} cannot be restored: call restore before it is sharded or wrapped")
    layer.on_restored()
    for part in list(layer.parts()):
        part.on_detached(layer)
        delattr(layer, part.place)
    for prefix, _ in list(layer.quantizers()):
        delattr(layer, prefix + SUFFIX)
    layer.__class__ = plain_class(layer)  # type: ignore[assignment]


def _revive(twin: type[Twin], plain: type[nn.Module]) -> nn.Module:
    cls = converted_class(twin, plain)
    return cls.__new__(cls)


def twins() -> list[type[Twin]]:
    """Every twin there is. One that is not part of qlightning is found as soon as its module is imported."""
    found: list[type[Twin]] = []
    pending: list[type[Twin]] = Twin.__subclasses__()
    while pending:
        cls = pending.pop()
        pending += [child for child in cls.__subclasses__() if child not in _plain_of]
        if not getattr(cls, "__abstractmethods__", None):
            found.append(cls)
    return found


def twin_for(module: nn.Module) -> type[Twin] | None:
    """The twin of a plain or converted layer, or None where there is none."""
    own_forward = replaced_forward(module)
    return next((t for t in twins() if isinstance(module, t) or (not own_forward and t.accepts(module))), None)


def replaced_forward(module: nn.Module) -> bool:
    """Whether somebody replaced the forward of this one instance: a class's forward would never be called."""
    return "forward" in vars(module)
