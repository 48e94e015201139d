"""PEFT's LoRA, moved inside the quantizer of the layer that it adapts."""

import sys
import weakref
from typing import Any

from torch import Tensor, nn

from qlightning.adapters.adapter import Adapter
from qlightning.adapters.inside import Inside
from qlightning.adapters.low_rank import LowRank


class FromPEFT(Adapter):
    """The adapters of PEFT's LoRA layer around a linear layer, inside the quantizer of that layer's weight.

    The layer computes x Q(W + sum of scaling * B A)^T over the active adapters, and no x Q(W)^T + scaling * x A^T B^T.
    Everything else stays PEFT's: which layers, ranks, scalings, which adapters are active or disabled, how they are
    merged, saved and loaded. Layers that PEFT does not wrap have no adapter.

    Args:
        otherwise: What layers get in a model of which PEFT wraps nothing; None makes such a model an error.
    """

    def __init__(self, *, otherwise: Adapter | None = None) -> None:
        super().__init__()
        self.otherwise = otherwise
        self._wrapper: weakref.ref[Any] | None = None  # gone when PEFT unloads: then there is nothing to add any more

    def under(self, wrapper: nn.Module | None, *, peft: bool) -> Adapter | None:
        if wrapper is None:
            return None if peft else self.otherwise
        linear = lora_linear()
        if linear is None or not isinstance(wrapper, linear):
            raise ValueError(
                f"PEFT adapts it as {type(wrapper).__module__}.{type(wrapper).__name__}, which cannot go inside a "
                "quantizer; LoRA of a linear layer can: get_peft_model(model, LoraConfig(r=8, target_modules=[...]))"
            )
        for name in wrapper.lora_A:
            check(wrapper, name)
        return FromPEFT()

    def build(self, matrix: Tensor, features: int) -> None:
        """There is nothing to create: the tensors are PEFT's."""

    def join(self, wrapper: nn.Module | None) -> None:
        """Take the adapters of PEFT's layer from now on, or (None) of none."""
        self._wrapper = None if wrapper is None else weakref.ref(wrapper)

    def __getstate__(self) -> dict[str, Any]:
        """Without the layer around it, which joins its own copy."""
        return {**super().__getstate__(), "_wrapper": None}  # type: ignore[misc]

    def kept_bits(self) -> None:
        """PEFT keeps floats."""

    def inside(self) -> Inside | None:
        wrapper: Any = None if self._wrapper is None else self._wrapper()
        if wrapper is None or wrapper.merged or wrapper.disable_adapters:
            return None
        pairs = []
        for name in wrapper.active_adapters:
            if name in wrapper.lora_A:
                check(wrapper, name)
                pairs.append((wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.scaling[name]))
        return LowRank(pairs) if pairs else None


def lora_linear() -> Any:
    """PEFT's LoRA layer around a linear layer, or None as long as nobody has imported PEFT."""
    return getattr(sys.modules.get("peft.tuners.lora.layer"), "Linear", None)


def wrapped_by_peft(module: nn.Module) -> dict[int, nn.Module]:
    """PEFT's layers in a module, by the id of the layer that each is around."""
    return {
        id(layer.base_layer): layer
        for layer in module.modules()
        if getattr(layer, "adapter_layer_names", ()) and isinstance(getattr(layer, "base_layer", None), nn.Module)
    }


def check(wrapper: Any, name: str) -> None:
    """Raise ValueError, with the right config, if an adapter is more than an update of the weight."""
    if (dropout := getattr(wrapper.lora_dropout[name], "p", 0.0)) > 0:
        raise ValueError(
            f"PEFT's adapter {name!r} drops inputs (lora_dropout={dropout}), but inside a quantizer it is part of the "
            "weight and has no input of its own: write LoraConfig(..., lora_dropout=0.0)"
        )
    if wrapper.lora_bias.get(name):
        raise ValueError(
            f"PEFT's adapter {name!r} adds to the bias, which is not inside a quantizer: write LoraConfig(..., "
            "lora_bias=False)"
        )
    if name in wrapper.lora_variant:
        variant = type(wrapper.lora_variant[name]).__name__
        raise ValueError(
            f"PEFT's adapter {name!r} is a variant of LoRA ({variant}) that is more than weight + scaling * B A: write "
            "LoraConfig(..., use_dora=False), with no variant's option set"
        )
