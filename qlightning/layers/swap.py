"""The swap of one layer, and of a whole model as a state dict describes it."""

import copy
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qlightning.adapters.adapter import Adapter
from qlightning.layers.coverage import kind_of, public_name
from qlightning.layers.layer import PLACES, SUFFIX, Twin, converted_class, restore_layer, twin_for
from qlightning.numerics.layer_part import LayerPart
from qlightning.numerics.rounding import Random
from qlightning.numerics.spec import rebuild, unparse
from qlightning.numerics.tensor_quantizer import TensorQuantizer, read_extra_state

Prototype = TypeVar("Prototype", bound=nn.Module)


class Swap:
    """Turns plain layers into their twins; layers that share a weight are given one quantizer for it.

    As a context it is all or nothing: an error that leaves it takes back every conversion made in it.

    Args:
        loading: A state dict is about to be loaded. Scales come from there, not from the weights as they are now, and
            layers that are converted already may differ in what only matters in training.
    """

    def __init__(self, *, loading: bool = False) -> None:
        self._loading = loading
        self._of_weight: dict[
            int, tuple[Tensor, str, TensorQuantizer]
        ] = {}  # with the weight, so that no other has its id
        self._converted: list[Twin] = []

    def __enter__(self) -> "Swap":
        return self

    def __exit__(self, kind: type[BaseException] | None, *args: object) -> None:
        if kind is not None:
            for layer in reversed(self._converted):
                restore_layer(layer)
            return
        for layer in () if self._loading else self._converted:
            if isinstance(adapter := layer._modules.get("adapter"), Adapter):
                adapter.on_kept(layer)

    def convert(
        self,
        layer: nn.Module,
        twin: type[Twin],
        wanted: Mapping[str, TensorQuantizer],
        *,
        name: str,
        parts: Sequence[LayerPart] = (),
    ) -> dict[str, TensorQuantizer]:
        """Give `layer` quantizers, by placement or prefix of their names. A twin that has just these is left alone.

        Args:
            layer: A plain or converted layer.
            twin: What it becomes.
            wanted: Prototypes of its quantizers.
            name: Its dotted name.
            parts: Prototypes of what it gets beside them.

        Returns:
            The quantizers that were asked for, by prefix.

        Raises:
            ValueError: A quantizer does not fit the layer, or the layer is converted otherwise already.
        """
        if isinstance(layer, Twin):
            asked = _by_prefix(layer, wanted)
            self._check_same(layer, asked, parts)
            return asked
        converted = self._change_class(layer, twin)
        try:
            asked = _by_prefix(converted, wanted)
            for prefix, prototype in asked.items():
                converted.add_module(prefix + SUFFIX, self._build(converted, prefix, prototype, name))
            for part in parts:
                self._attach(converted, part, name)
            converted.on_converted()
        except BaseException:
            self._converted.pop()
            restore_layer(converted)
            raise
        return asked

    def convert_around(self, module: nn.Module) -> None:
        """Convert the layers without quantizers of their own that must know that layers inside them are converted."""
        for layer in list(module.modules()):
            twin = twin_for(layer)
            if twin is None or twin.placements or isinstance(layer, Twin):
                continue
            if twin.surrounds(layer):
                self._change_class(layer, twin).on_converted()

    def _change_class(self, layer: nn.Module, twin: type[Twin]) -> Twin:
        layer.__class__ = converted_class(twin, type(layer))  # type: ignore[assignment]
        assert isinstance(layer, Twin)
        self._converted.append(layer)
        return layer

    def _attach(self, layer: Twin, prototype: LayerPart, name: str) -> None:
        if prototype.place not in layer.places:
            raise ValueError(f"it has no place for a {prototype.place}; give it a rule of its own without one")
        own = [*layer.weights().values(), *layer.parameters()]  # an attention module has none but those of its layers
        matrix = own[0].detach()
        part = _copy(prototype, f"{name}.{prototype.place}")
        part.build(matrix, layer.features())
        layer.add_module(part.place, part.to(matrix.device).train(layer.training))
        part.on_attached(layer)

    def _check_same(self, layer: Twin, asked: Mapping[str, TensorQuantizer], parts: Sequence[LayerPart]) -> None:
        present = dict(layer.quantizers())
        alike = "deploys_like" if self._loading else "trains_like"
        same = set(present) == set(asked) and all(getattr(present[p], alike)(asked[p]) for p in asked)
        mine = list(layer.parts())
        if not same or len(mine) != len(parts) or not all(map(LayerPart.trains_like, mine, parts)):
            raise ValueError(
                f"it is converted already, with {_shown(layer)}; call qlightning.restore(module) before another scheme"
            )

    def _build(self, layer: Twin, prefix: str, prototype: TensorQuantizer, name: str) -> TensorQuantizer:
        if prefix not in layer.weights():
            return _activation_quantizer(layer, prefix, prototype, f"{name}.{prefix}")
        weight = getattr(layer, prefix)
        if id(weight) in self._of_weight:
            _, first, known = self._of_weight[id(weight)]
            if not known.trains_like(prototype):
                raise ValueError(
                    f"it shares its weight with {first!r}, which has {unparse(known) or known!r}: give both one spec"
                )
            return known
        quantizer = self._weight_quantizer(layer.weights()[prefix].detach(), prototype, f"{name}.{prefix}")
        self._of_weight[id(weight)] = weight, name, quantizer.train(layer.training)
        return quantizer

    def _weight_quantizer(self, matrix: Tensor, prototype: TensorQuantizer, name: str) -> TensorQuantizer:
        if hasattr(matrix, "placements"):  # a DTensor
            raise ValueError(
                "its weight is sharded already (a DTensor), by row or column of a product or by fully_shard before it "
                "was converted. A configure_model that builds and shards calls qlightning.convert(self, ...), with the "
                "rules of the QATCallback, in between; or it only builds, and Trainer(strategy=QuantizedFSDP()) shards"
            )
        quantizer = _copy(prototype, name)
        quantizer.build(tuple(matrix.shape))
        quantizer.to(matrix.device)
        if not matrix.is_meta and not self._loading:
            if not bool(torch.isfinite(matrix).all()):
                raise ValueError("its weight holds NaN or infinity: load or train sound weights before converting")
            quantizer.initialize(matrix)
        return quantizer


def _shown(layer: Twin) -> str:
    shown = [f"{prefix} {unparse(quantizer) or quantizer!r}" for prefix, quantizer in layer.quantizers()]
    return ", ".join([*shown, *(f"{part.place} {part!r}" for part in layer.parts())])


def _by_prefix(layer: Twin, wanted: Mapping[str, TensorQuantizer]) -> dict[str, TensorQuantizer]:
    return {
        prefix: quantizer
        for place, quantizer in wanted.items()
        for prefix in (layer.prefixes(place) if place in layer.placements else (place,))
    }


def _activation_quantizer(layer: Twin, prefix: str, prototype: TensorQuantizer, name: str) -> TensorQuantizer:
    quantizer = _copy(prototype, name)
    quantizer.build((-1, layer.output_features() if prefix == "output" else layer.features()))
    device = next((p.device for p in layer.parameters()), torch.device("cpu"))
    quantizer.see_own_share()
    return quantizer.to(device).train(layer.training)


def _copy(prototype: Prototype, name: str) -> Prototype:
    copied = copy.deepcopy(prototype)
    for inner, child in copied.named_modules():
        if isinstance(child, Random) and child.seed == 0:  # layers must not round with the same random numbers
            child.seed = zlib.crc32(f"{name}.{inner.removesuffix('rounding')}".removesuffix(".").encode())
    return copied


def _placement(twin: type[Twin], prefix: str) -> str:
    return next((place for place, prefixes in twin.placements.items() if prefix in prefixes), "weight")


_EXTRA_STATE = re.compile(rf"(?:(?P<layer>.*)\.)?(?P<prefix>\w+){SUFFIX}\._extra_state")
_PART_STATE = re.compile(rf"(?:(?P<layer>.*)\.)?(?:{'|'.join(PLACES)})\._extra_state")
_WITHIN = re.compile(rf"(?:^|\.)(?:\w+{SUFFIX}|backward)\.")


def schemes_in(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, TensorQuantizer]]:
    """The quantizers a state dict describes, by layer name and prefix; empty for a float model's."""
    found: dict[str, dict[str, TensorQuantizer]] = {}
    for key, value in state_dict.items():
        if match := _EXTRA_STATE.fullmatch(key):
            quantizer = rebuild(read_extra_state(value)["quantizer"])
            found.setdefault(match["layer"] or "", {})[match["prefix"]] = quantizer
    return found


def parts_in(state_dict: Mapping[str, Tensor]) -> dict[str, list[LayerPart]]:
    """What a state dict describes beside quantizers, by layer name and in the order of `PLACES`."""
    found: dict[str, list[LayerPart]] = {}
    for key, value in state_dict.items():
        match = _PART_STATE.fullmatch(key)
        if match and not _WITHIN.search(f"{match['layer'] or ''}."):
            found.setdefault(match["layer"] or "", []).append(rebuild(read_extra_state(value)["part"]))
    return {name: sorted(parts, key=lambda part: PLACES.index(part.place)) for name, parts in found.items()}


def convert_like(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Convert `module` in place as the model was that `state_dict` was taken from. A float state dict changes nothing.

    Load the state dict next: until then, scales that are state have no value.

    Raises:
        ValueError: The state dict has quantizers for layers that `module` does not have or that cannot carry them.
    """
    schemes, parts = schemes_in(state_dict), parts_in(state_dict)
    with Swap(loading=True) as swap:
        for name, by_prefix in schemes.items():
            try:
                layer = module.get_submodule(name)
            except AttributeError:
                raise ValueError(
                    f"the checkpoint quantizes {name!r}, which {type(module).__name__} does not have"
                ) from None
            twin = twin_for(layer)
            if twin is None:
                raise ValueError(f"the checkpoint quantizes {name!r}, which is a {kind_of(layer)} here")
            try:
                swap.convert(layer, twin, by_prefix, name=public_name(name), parts=parts.get(name, ()))
            except ValueError as error:
                specs = {_placement(twin, prefix): unparse(q) or q for prefix, q in by_prefix.items()}
                call = ", ".join(f"{placement}={spec!r}" for placement, spec in specs.items())
                raise ValueError(
                    f"the checkpoint quantizes {name!r} as QATCallback({call}) does, but {error}"
                ) from None
        if schemes:
            _check_float(module, state_dict, schemes)
        swap.convert_around(module)


def _check_float(module: nn.Module, state_dict: Mapping[str, Tensor], schemes: Mapping[str, Any]) -> None:
    """What a converted model's state dict holds in float must not be quantized here."""
    for name, layer in module.named_modules():
        if name in schemes or not isinstance(layer, Twin) or not any(True for _ in layer.quantizers()):
            continue
        if any(key.startswith(f"{name}.") for key in state_dict):
            raise ValueError(
                f"the checkpoint holds {name!r} in float, but it is converted here, with {_shown(layer)}; add "
                f"rules={{{public_name(name)!r}: None}}, or call qlightning.restore(module) before another scheme"
            )
