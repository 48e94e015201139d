"""PEFT's adapters outside of quantizers: written beside the quantized base, in PEFT's own format.

The base lies in the artifact's folder, the adapters in `adapter/`: `PeftModel.from_pretrained(base, f"{out}/adapter")`
computes what was trained. As PEFT has it, the adapter called "default" is `adapter/adapter_config.json` and
`adapter/adapter_model.safetensors`, any other one lies in a folder of its name below.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlightning.export.artifact import Shards, inside
from qlightning.export.inputs import Call
from qlightning.export.merge import is_wrapper
from qlightning.export.verify import run
from qlightning.layers.layer import Twin

FOLDER = "adapter"


class Adapters:
    """The adapters of a module whose layers PEFT wraps; of any other module, none, and every method does nothing.

    Args:
        module: A module; adapters inside quantizers are merged already.

    Attributes:
        model: The `PeftModel`, or None.

    Raises:
        ValueError: They are more than layers around layers of one model, or are merged into weights.
    """

    def __init__(self, module: nn.Module) -> None:
        models: list[Any] = [child for child in module.modules() if _is_peft_model(child)]
        self._wrapped = [
            (parent, name, child)
            for parent in module.modules()
            for name, child in parent.named_children()
            if _wraps(child)
        ]
        inner = {id(part) for *_, wrapper in self._wrapped for part in wrapper.modules() if part is not wrapper}
        self._wrapped = [found for found in self._wrapped if id(found[2]) not in inner]
        prompts = any(config.is_prompt_learning for model in models for config in model.peft_config.values())
        if prompts:
            raise ValueError("prompts that PEFT learns are not exported: train an adapter of layers, LoraConfig(...)")
        self.model = models[0] if models and self._wrapped else None
        if self._wrapped:
            self._check(len(models))

    def __bool__(self) -> bool:
        return self.model is not None

    def _check(self, count: int) -> None:
        if self.model is None or count > 1:
            raise ValueError(
                f"{len(self._wrapped)} layers have adapters of PEFT, but {count or 'no'} models are a PeftModel: wrap "
                "the one that is exported, get_peft_model(model, config)"
            )
        if merged := [name for *_, wrapper in self._wrapped for name in getattr(wrapper, "merged_adapters", ())]:
            raise ValueError(
                f"PEFT's adapter {merged[0]!r} is merged into weights whose quantizers did not see it in training: "
                "call peft_model.unmerge_adapter() first"
            )
        for _, name, wrapper in self._wrapped:
            if any(isinstance(part, Twin) for part in _copies(wrapper)):
                raise ValueError(
                    f"PEFT saves {name} as a whole (modules_to_save), and it is quantized, for which an adapter's "
                    f"files have no place: leave it in float, rules={{{name!r}: None}}"
                )

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base alone, under the names it has without PEFT. Nothing is copied."""
        for parent, name, wrapper in self._wrapped:
            inner = "base_layer" if is_wrapper(wrapper) else "original_module"
            parent._modules[name] = wrapper._modules[inner]
        try:
            yield
        finally:
            for parent, name, wrapper in self._wrapped:
                parent._modules[name] = wrapper

    def write(self, folder: Path) -> None:
        """Write every adapter: its config as JSON and its tensors as safetensors."""
        if self.model is None:
            return
        from peft import get_peft_model_state_dict

        for name, config in self.model.peft_config.items():
            place = _place(folder, name)
            place.mkdir(parents=True)
            config = copy.copy(config)
            # the base lies above, wherever that is moved; the float model it once was is another one
            config.base_model_name_or_path, config.inference_mode = None, True
            config.save_pretrained(str(place))
            shards = Shards(place, stem="adapter_model", shard_bytes=2**62)  # PEFT reads one file
            tensors = get_peft_model_state_dict(self.model, adapter_name=name, save_embedding_layers=False)
            for key, tensor in tensors.items():
                shards.add(key, tensor)
            shards.close()

    def load(self, base: Callable[..., Any], folder: Path, call: Call, dtype: torch.dtype) -> Callable[..., Any]:
        """The loaded base with the written adapters, as PEFT puts them there.

        Args:
            base: What the target loaded.
            folder: The artifact.
            call: Any call of the model.
            dtype: In which the artifact computes.
        """
        if self.model is None:
            return base
        from peft import PeftModel

        assert isinstance(base, nn.Module)
        with torch.no_grad():
            run(base, call, dtype)  # compressed-tensors unpacks weights, which PEFT looks at, in the first run
        first, *others = self.model.peft_config
        floats = any(p.dtype == torch.float32 for p in _trained(self.model))
        wrapped: Any = PeftModel.from_pretrained(
            base, str(_place(folder, first)), adapter_name=first, autocast_adapter_dtype=floats
        )
        for name in others:
            wrapped.load_adapter(str(_place(folder, name)), adapter_name=name, autocast_adapter_dtype=floats)
        wrapped.base_model.set_adapter(list(self.model.active_adapters), inference_mode=True)
        _check_read(wrapped, folder)
        return wrapped.get_base_model().eval()  # type: ignore[no-any-return]


def _place(folder: Path, name: str) -> Path:
    return folder / FOLDER if name == "default" else inside(folder, f"{FOLDER}/{name}")


def _is_peft_model(module: nn.Module) -> bool:
    return hasattr(module, "peft_config") and hasattr(type(module), "get_base_model")


def _wraps(module: nn.Module) -> bool:
    """Whether PEFT put it in the place of a layer: around one, or beside one as `modules_to_save` does."""
    beside = hasattr(module, "unload_and_optionally_merge_module") and hasattr(module, "original_module")
    return beside or is_wrapper(module)


def _copies(wrapper: Any) -> Iterator[nn.Module]:
    """The modules in a wrapper that are the adapter's own."""
    for name, child in wrapper.named_children():
        if name not in ("base_layer", "original_module"):
            yield from child.modules()


def _trained(model: Any) -> Iterator[torch.Tensor]:
    """The parameters that are the adapters' own."""
    for wrapper in (child for child in model.modules() if _wraps(child)):
        for part in _copies(wrapper):
            yield from part.parameters(recurse=False)


def _check_read(wrapped: Any, folder: Path) -> None:
    """PEFT only warns of tensors it misses, and says nothing of those it does not know."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    for name in wrapped.peft_config:
        with safe_open(str(_place(folder, name) / "adapter_model.safetensors"), framework="pt") as file:
            written = set(file.keys())
        read = set(get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False))
        if written != read:
            raise ValueError(f"PEFT does not read adapter {name!r} back: {sorted(written ^ read)[:3]}")
