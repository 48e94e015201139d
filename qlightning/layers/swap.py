"""The swap of one layer, and of a whole model as a state dict describes it."""

import copy
import re
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qlightning.layers.coverage import kind_of, public_name
from qlightning.layers.layer import SUFFIX, Twin, converted_class, plain_class, twin_for
from qlightning.numerics.quantizer import Quantizer, read_extra_state
from qlightning.numerics.rounding import Stochastic
from qlightning.numerics.spec import rebuild


class Swap:
    """Turns plain layers into their twins; layers that share a weight are given one quantizer for it."""

    def __init__(self) -> None:
        self._of_weight: dict[int, Quantizer] = {}

    def convert(self, layer: nn.Module, twin: type[Twin], wanted: Mapping[str, Quantizer], *, name: str) -> None:
        """Give `layer` quantizers, by placement or prefix of their names. A twin that has just these is left alone.

        Raises:
            ValueError: A quantizer does not fit the layer, or the layer is converted otherwise already.
        """
        if isinstance(layer, Twin):
            self._check_same(layer, wanted)
            return
        layer.__class__ = converted_class(twin, type(layer))  # type: ignore[assignment]
        assert isinstance(layer, Twin)
        try:
            for prefix, prototype in _by_prefix(layer, wanted).items():
                layer.add_module(prefix + SUFFIX, self._build(layer, prefix, prototype, name))
            layer.on_converted()
        except ValueError:
            for prefix, _ in list(layer.quantizers()):
                delattr(layer, prefix + SUFFIX)
            layer.__class__ = plain_class(layer)  # type: ignore[assignment]
            raise

    def _check_same(self, layer: Twin, wanted: Mapping[str, Quantizer]) -> None:
        present, asked = dict(layer.quantizers()), _by_prefix(layer, wanted)
        if set(present) != set(asked) or not all(present[prefix].deploys_like(asked[prefix]) for prefix in asked):
            raise ValueError(
                f"it is converted already, with {present}; call qlightning.restore(module) before another scheme"
            )

    def _build(self, layer: Twin, prefix: str, prototype: Quantizer, name: str) -> Quantizer:
        if prefix not in layer.weights():
            return _activation_quantizer(layer, prototype, f"{name}.{prefix}")
        weight = getattr(layer, prefix)
        if (known := self._of_weight.get(id(weight))) is not None:
            return known
        quantizer = _weight_quantizer(layer.weights()[prefix].detach(), prototype, f"{name}.{prefix}")
        self._of_weight[id(weight)] = quantizer
        return quantizer


def _by_prefix(layer: Twin, wanted: Mapping[str, Quantizer]) -> dict[str, Quantizer]:
    return {
        prefix: quantizer
        for place, quantizer in wanted.items()
        for prefix in (layer.prefixes(place) if place in layer.placements else (place,))
    }


def _activation_quantizer(layer: Twin, prototype: Quantizer, name: str) -> Quantizer:
    quantizer = _copy(prototype, name)
    quantizer.build((-1, layer.features()))
    return quantizer.to(next((p.device for p in layer.parameters()), torch.device("cpu")))


def _weight_quantizer(matrix: Tensor, prototype: Quantizer, name: str) -> Quantizer:
    if hasattr(matrix, "placements"):  # a DTensor
        raise ValueError("its weight is sharded already: convert before sharding, for example in configure_model")
    quantizer = _copy(prototype, name)
    quantizer.build(tuple(matrix.shape))
    quantizer.to(matrix.device)
    if not matrix.is_meta:
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError("its weight holds NaN or infinity: load or train sound weights before converting")
        quantizer.initialize(matrix)
    return quantizer


def _copy(prototype: Quantizer, name: str) -> Quantizer:
    quantizer = copy.deepcopy(prototype)
    if isinstance(quantizer.rounding, Stochastic) and quantizer.rounding.seed == 0:
        quantizer.rounding.seed = zlib.crc32(name.encode())  # layers must not round with the same random numbers
    return quantizer


def convert_around(module: nn.Module) -> None:
    """Convert the layers that have no quantizers of their own but must know that layers inside them are converted."""
    for layer in list(module.modules()):
        twin = twin_for(layer)
        if twin is None or twin.placements or isinstance(layer, Twin):
            continue
        if any(isinstance(inner, Twin) for inner in layer.modules()):
            layer.__class__ = converted_class(twin, type(layer))  # type: ignore[assignment]


_EXTRA_STATE = re.compile(rf"(?:(?P<layer>.*)\.)?(?P<prefix>\w+){SUFFIX}\._extra_state")


def schemes_in(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Quantizer]]:
    """The quantizers a state dict describes, by layer name and prefix; empty for a float model's."""
    found: dict[str, dict[str, Quantizer]] = {}
    for key, value in state_dict.items():
        if match := _EXTRA_STATE.fullmatch(key):
            quantizer = rebuild(read_extra_state(value)["quantizer"])
            found.setdefault(match["layer"] or "", {})[match["prefix"]] = quantizer
    return found


def convert_like(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Convert `module` in place as the model was that `state_dict` was taken from. A float state dict changes nothing.

    Raises:
        ValueError: The state dict has quantizers for layers that `module` does not have or that cannot carry them.
    """
    swap = Swap()
    for name, by_prefix in schemes_in(state_dict).items():
        try:
            layer = module.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"the checkpoint quantizes {name!r}, which {type(module).__name__} does not have"
            ) from None
        twin = twin_for(layer)
        if twin is None:
            raise ValueError(f"the checkpoint quantizes {name!r}, which is a {kind_of(layer)} here")
        swap.convert(layer, twin, by_prefix, name=public_name(name))
    convert_around(module)
