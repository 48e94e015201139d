"""PEFT's adapters inside quantizers: merged before export, which changes nothing that is computed."""

import copy
from typing import Any

from torch import nn

from qlightning.layers.peft import LoraTwin


def has_adapters(module: nn.Module) -> bool:
    """Whether PEFT wraps layers of the module."""
    return any(is_wrapper(child) for child in module.modules())


def merge_adapters(module: nn.Module, *, in_place: bool = False) -> nn.Module:
    """The module with PEFT's adapters merged into the weights that their quantizers saw all along, and PEFT gone.

    Adapters outside of quantizers stay as they are: `peft.py` writes them beside the base.

    Args:
        module: A module without adapters is returned as it is.
        in_place: Change the module itself, where nobody will train it on; else a copy.

    Raises:
        ValueError: Some adapters are inside of their layers' quantizers and some outside.
    """
    wrappers = {name: child for name, child in module.named_modules() if is_wrapper(child)}
    outside = [name for name, child in wrappers.items() if not isinstance(child, LoraTwin)]
    if len(outside) == len(wrappers):
        return module
    if outside:
        raise ValueError(
            f"PEFT's adapters are outside of the quantizer in {len(outside)} layers ({outside[0]}) and inside in "
            f"{len(wrappers) - len(outside)}, where they are merged: adapt only layers that are quantized, "
            "LoraConfig(target_modules=[...]), or give no layer Scheme(..., adapter='peft')"
        )
    merged = module if in_place else copy.deepcopy(module)
    models: list[Any] = [child for child in merged.modules() if _is_peft_model(child)]
    for model in models:
        model.merge_and_unload()
    return merged


def is_wrapper(module: nn.Module) -> bool:
    """Whether it is a layer of PEFT around a layer of the model."""
    return bool(getattr(module, "adapter_layer_names", ())) and isinstance(
        getattr(module, "base_layer", None), nn.Module
    )


def _is_peft_model(module: Any) -> bool:
    return hasattr(module, "peft_config") and callable(getattr(module, "merge_and_unload", None))
