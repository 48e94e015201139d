"""What is exported: a trained model, layer by layer, in the words of its own quantizers. Nothing is quantized again."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlightning.layers.layer import SUFFIX, Twin, plain_class
from qlightning.numerics.granularity import PerChannel, PerGroup, PerTensor
from qlightning.numerics.quantizer import Quantized, Quantizer


class Weight:
    """A quantized weight of a layer.

    Attributes:
        name: Name of the parameter in the model's state dict, "model.layers.0.mlp.up_proj.weight".
        layer: The converted layer that owns it.
        prefix: Prefix of its quantizer's name in the layer.
        quantizer: What quantizes it; a `Quantizer`, or one composed of several, which has values but no codes.
    """

    def __init__(self, name: str, layer: Twin, prefix: str) -> None:
        self.name, self.layer, self.prefix = name, layer, prefix
        self.quantizer: Any = layer.quantizer(prefix)

    @property
    def parameter(self) -> Tensor:
        """The weight that the layer holds, without what an adapter adds to it; where that says so, one-byte numbers."""
        parameter: Tensor = getattr(self.layer, self.prefix)
        return parameter.detach()

    @property
    def has_codes(self) -> bool:
        """Whether codes and scales say it all; False for composed quantizers and for those in another basis."""
        return isinstance(self.quantizer, Quantizer) and self.quantizer.transform is None

    @property
    def matrix_is_parameter(self) -> bool:
        """Whether the parameter itself is the matrix (output channels, fan-in) that is quantized."""
        matrix, parameter = self.layer.weights()[self.prefix], self.parameter
        return (
            matrix.data_ptr() == parameter.data_ptr()
            and matrix.shape == parameter.shape
            and matrix.stride() == parameter.stride()
        )

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype in which its scales ship."""
        fixed = self.quantizer.scale.ships_as or self.quantizer.scale_dtype
        own = self.layer.effective(self.prefix).dtype
        return fixed or (own if own in (torch.float16, torch.bfloat16) else torch.float32)

    @torch.no_grad()
    def quantize(self) -> Quantized:
        """Codes (output channels, fan-in) with scale and zero point, as the trained quantizer stores them."""
        assert self.has_codes, self.name
        stored: Quantized = self.quantizer.quantize(self.layer.effective(self.prefix))
        return stored

    @property
    def integer_bits(self) -> int | None:
        """Bits of the two's complement that holds its values in units of the scale; None where they are no integers."""
        if not self.has_codes:
            return None
        values = self.quantizer.format.values()
        if any(value != int(value) for value in values):
            return None
        return max(int(-min(values)) - 1, int(max(values)), 0).bit_length() + 1

    def integers(self, codes: Tensor) -> Tensor:
        """Codes of a format whose values are integers as these integers, int8 (int16 above 8 bits)."""
        dtype = torch.int8 if (self.integer_bits or 0) <= 8 else torch.int16
        return self.quantizer.format.decode(codes).to(dtype)  # type: ignore[no-any-return]

    def by_group(self, scale: Tensor) -> Tensor:
        """Scales or zero points of groups, channels or the tensor as (output channels, groups)."""
        granularity = self.quantizer.granularity
        if isinstance(granularity, PerGroup):
            return scale.squeeze(-1)
        assert isinstance(granularity, PerChannel | PerTensor), granularity
        return scale.reshape(-1, 1).expand(self.layer.weights()[self.prefix].shape[0], 1).contiguous()

    @torch.no_grad()
    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values on the grid in the parameter's shape: what the trained layer computes with.

        Args:
            dtype: What they are cast to; the dtype the layer computes in when not given.
        """
        values = self.quantizer(self.layer.effective(self.prefix))
        return self.in_shape(values).to(dtype or values.dtype)

    def in_shape(self, matrix: Tensor) -> Tensor:
        """A matrix (output channels, fan-in) in the parameter's shape."""
        if self.matrix_is_parameter:
            return matrix
        # The layer alone knows how it sees its weight as a matrix: shown positions instead of weights, it tells.
        owner, name = self._slot()
        own = owner._parameters[name]
        assert own is not None
        positions = torch.arange(own.numel(), device=own.device).view(own.shape)
        try:
            owner._parameters[name] = nn.Parameter(positions, requires_grad=False)
            order = self.layer.weights()[self.prefix].reshape(-1)
        finally:
            owner._parameters[name] = own
        flat = torch.empty_like(matrix, memory_format=torch.contiguous_format).reshape(-1)
        flat[order] = matrix.reshape(-1)
        return flat.view(own.shape)

    def _slot(self) -> tuple[nn.Module, str]:
        """The module that holds the parameter, and its name there."""
        wanted = getattr(self.layer, self.prefix)
        return next(
            (module, name)
            for module in self.layer.modules()
            for name, parameter in module._parameters.items()
            if parameter is wanted
        )


class Layer:
    """A converted layer.

    Attributes:
        name: Dotted name in the model.
        twin: The layer itself.
        kind: Name of its plain class.
        weights: Its quantized weights, without those whose quantizer was released, which are float.
        activations: Acting quantizers of what is no weight, by placement.
        transform: What the layer does with its input before all else, or None.
    """

    def __init__(self, name: str, twin: Twin) -> None:
        self.name, self.twin, self.kind = name, twin, plain_class(twin).__name__
        owned = {id(p): local for local, p in twin.named_parameters(remove_duplicate=False)}
        matrices = twin.weights()
        self.weights = [
            Weight(_join(name, owned[id(getattr(twin, prefix))]), twin, prefix)
            for prefix, quantizer in twin.quantizers()
            if prefix in matrices and not quantizer.released
        ]
        self.transform = _transform(twin)
        self.activations: dict[str, list[Any]] = {}
        for prefix, quantizer in twin.quantizers():
            if prefix not in matrices and quantizer.enabled:
                self.activations.setdefault(_placement(twin, prefix), []).append(quantizer)


class Trained:
    """A trained module and the part of it that is exported.

    That part is the transformers or diffusers model in it, if all its parameters are there, and else the module itself.

    Args:
        module: Any module with converted layers, in eval mode.

    Attributes:
        module: The whole.
        model: The exported part.
        layers: Its converted layers, in the model's order.
        dtype: Dtype of its parameters.

    Raises:
        ValueError: Nothing in it is quantized, or its quantizers do not act (yet).
    """

    def __init__(self, module: nn.Module) -> None:
        if module.training:
            raise ValueError("a model is exported as it is evaluated: call module.eval() first")
        self.module = module
        self.model: Any = _pretrained(module) or module
        self.layers = [
            Layer(name, child)
            for name, child in self.model.named_modules()
            if isinstance(child, Twin) and (any(True for _ in child.quantizers()) or _transform(child) is not None)
        ]
        self.dtype: torch.dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        self._check()

    def _check(self) -> None:
        if not self.layers:
            raise ValueError(
                "nothing in the module is quantized: export what QATCallback trained, or use Lightning's and "
                "transformers' own ways to save a float model"
            )
        if not any(layer.weights or layer.activations or layer.transform for layer in self.layers):
            raise ValueError(
                "all quantizers of the module were released: it ended its training in float, so there are no codes; "
                "export an earlier checkpoint, or call qlightning.restore(module) and save the float model"
            )
        idle = [weight.name for weight in self.weights if not (weight.quantizer.enabled and weight.quantizer.ready)]
        if idle:
            raise ValueError(
                f"{len(idle)} weight quantizers do not act yet ({', '.join(idle[:3])}): the run had not come to "
                "QATCallback(start=...) when it was saved; export a later checkpoint"
            )
        if any(hasattr(parameter, "placements") for parameter in self.model.parameters()):  # DTensors
            raise ValueError("its weights are sharded: export from a checkpoint, which is gathered when it is loaded")

    @property
    def weights(self) -> Iterator[Weight]:
        """Every quantized weight; one that several layers share is named by each."""
        for layer in self.layers:
            yield from layer.weights

    @property
    def config(self) -> Any:
        """The model's transformers config, or None."""
        config = getattr(self.model, "config", None)
        return config if hasattr(config, "to_json_string") and hasattr(config, "model_type") else None

    def floats(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the state dict without quantized weights and without what conversion added."""
        added = tuple(f"{name}." for name in _added(self.model))
        quantized = {weight.name for weight in self.weights}
        for name, tensor in self.model.state_dict().items():
            if isinstance(tensor, Tensor) and name not in quantized and not name.startswith(added):
                yield name, tensor.detach()

    def tied(self) -> Mapping[str, str]:
        """For each further name of a parameter that has several, the first one."""
        first: dict[int, str] = {}
        return {
            name: first[id(parameter)]
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if first.setdefault(id(parameter), name) != name
        }


def _pretrained(module: nn.Module) -> nn.Module | None:
    """The outermost transformers or diffusers model that holds all parameters of `module`, or None."""
    parameters = {id(p) for p in module.parameters()}
    for child in module.modules():
        cls = type(child)  # what PEFT wraps around a model hands on the model's own attributes
        known = callable(getattr(cls, "save_pretrained", None)) and hasattr(child, "config")
        if known and not hasattr(cls, "get_base_model") and {id(p) for p in child.parameters()} == parameters:
            return child
    return None


def _added(module: nn.Module) -> Iterator[str]:
    """Names of the modules that conversion added: quantizers, transforms and adapters."""
    for name, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, Twin):
            yield from (_join(name, prefix + SUFFIX) for prefix, _ in child.quantizers())
            yield from (_join(name, part.place) for part in child.parts())


def _transform(twin: Twin) -> Any:
    return next((part for part in twin.parts() if part.place == "transform"), None)


def _placement(twin: Twin, prefix: str) -> str:
    return next(place for place, prefixes in twin.placements.items() if prefix in prefixes)


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
