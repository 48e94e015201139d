"""PEFT's adapters before export: those inside quantizers are merged, which changes nothing that is computed."""

import copy
from typing import Any

from torch import nn

from qlightning.layers.peft import LoraTwin


def has_adapters(module: nn.Module) -> bool:
    """Whether PEFT wraps layers of the module."""
    return any(_is_wrapper(child) for child in module.modules())


def merge_adapters(module: nn.Module, *, in_place: bool = False) -> nn.Module:
    """The module with PEFT's adapters merged into the weights that their quantizers saw all along, and PEFT gone.

    Args:
        module: A module without adapters is returned as it is.
        in_place: Change the module itself, where nobody will train it on; else a copy.

    Raises:
        ValueError: An adapter is outside of its layer's quantizer: the sum is on no grid, so that no merge is exact.
    """
    if not has_adapters(module):
        return module
    outside = [name for name, child in module.named_modules() if _is_wrapper(child) and not isinstance(child, LoraTwin)]
    if outside:
        raise ValueError(
            f"{len(outside)} of PEFT's adapters are outside of the quantizers ({outside[0]}), so merged weights would "
            "be on no grid: train with adapters inside, Scheme('int4-g128', adapter='peft'), or export the base alone, "
            "export_module(peft_model.unload(), ...), beside the adapter, peft_model.save_pretrained(...)"
        )
    merged = module if in_place else copy.deepcopy(module)
    models: list[Any] = [child for child in merged.modules() if _is_peft_model(child)]
    for model in models:
        model.merge_and_unload()
    return merged


def _is_wrapper(module: nn.Module) -> bool:
    return bool(getattr(module, "adapter_layer_names", ())) and isinstance(
        getattr(module, "base_layer", None), nn.Module
    )


def _is_peft_model(module: Any) -> bool:
    return hasattr(module, "peft_config") and callable(getattr(module, "merge_and_unload", None))
