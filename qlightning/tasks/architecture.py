"""A transformers model from what a user can write down: a local folder, a hub name, or the keys of its config."""

import difflib
import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

_TAKEN_BESIDE_THE_CONFIG = {
    "model_type",
    "num_labels",
    "attn_implementation",
    "rope_theta",
    "rope_scaling",
    "torch_dtype",
}


def transformers_model(auto: Any, source: str | Mapping[str, Any], *, known: Mapping[str, Any]) -> Any:
    """Load or build a model, in the default dtype of the moment (the precision plugin's under `configure_model`).

    Args:
        auto: One of transformers' auto classes, for example `AutoModelForCausalLM`.
        source: A local folder or hub name, whose weights are loaded, or a config with `model_type`, for random weights.
        known: Config values that the data tell, used where a config does not set them; None means that they do not.

    Raises:
        ValueError: The folder does not exist, or the config has no `model_type`, an unknown one, or keys that the
            architecture does not have.
    """
    dtype = torch.get_default_dtype()
    if isinstance(source, str):
        return auto.from_pretrained(_existing(source), dtype=dtype).train()  # it comes in eval mode and would stay so
    filled = {k: v for k, v in known.items() if v is not None}
    return auto.from_config(_config({**filled, **source}), dtype=dtype)


def plain_config(model: Any) -> dict[str, Any]:
    """A model's config as plain values that `transformers_model` takes: with it a checkpoint needs no other file."""
    config = json.loads(model.config.to_json_string(use_diff=True))
    config.pop("dtype", None)  # decided by the Trainer's precision
    return config


def from_data(task: LightningModule, name: str) -> Any:
    """What the run's datamodule knows under `name`, or None: without a Trainer, a datamodule, or that attribute."""
    trainer: Any = task._trainer  # `task.trainer` raises where there is none
    return None if trainer is None else getattr(trainer.datamodule, name, None)


def _existing(source: str) -> str:
    # what can only be a path is not looked up on the hub, which takes a minute of retries where there is no network
    path = Path(source).expanduser()
    if path.exists():
        return str(path)
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"model={source!r} does not exist; write a local folder, or a hub name as 'user/name'")
    return source


def _config(options: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = options.get("model_type")
    if kind not in CONFIG_MAPPING_NAMES:
        hint = nearest(str(kind), CONFIG_MAPPING_NAMES)
        wrong = "has no model_type" if kind is None else f"names no architecture of transformers: {kind!r}{hint}"
        raise ValueError(f'the config {wrong}; write for example {{"model_type": "llama", "hidden_size": 128}}')
    config = AutoConfig.for_model(**options)
    # transformers keeps any unknown key as an attribute that nothing reads: a slip of the pen would pass unnoticed
    taken = {*type(config)().to_dict(), *config.attribute_map, *_TAKEN_BESIDE_THE_CONFIG}
    refuse_unknown(options, taken, owner=type(config).__name__)
    return config


def refuse_unknown(options: Iterable[str], taken: Iterable[str], *, owner: str) -> None:
    """Raise a ValueError for the first of `options` that is not in `taken`, with the nearest name that is."""
    names = set(taken)
    for key in options:
        if key not in names:
            raise ValueError(f"{owner} has no option {key!r}{nearest(key, names)}")


def nearest(word: str, names: Iterable[str]) -> str:
    """A question that names the nearest of `names`, or nothing where none is near."""
    found = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def diffusers_model(source: str | Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Load or build a diffusers model, in the default dtype of the moment, and the config that builds it again.

    Args:
        source: A local folder or hub name, whose weights are loaded, or a config with `_class_name` for random weights.

    Raises:
        ValueError: `_class_name` is missing or names no model that takes classes, or the config has unknown keys.
    """
    diffusers, dtype = import_diffusers(), torch.get_default_dtype()
    if isinstance(source, str):
        model = diffusers.AutoModel.from_pretrained(_existing(source), torch_dtype=dtype).train()
        config = {k: v for k, v in model.config.items() if not k.startswith("_")}
        return model, {"_class_name": type(model).__name__, **config}
    name = source.get("_class_name")
    kind: Any = getattr(diffusers, str(name), None)
    if "class_labels" not in getattr(getattr(kind, "forward", None), "__annotations__", ()):
        raise ValueError(
            f"_class_name {name!r} names no image denoiser of diffusers; write for example "
            '{"_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1}'
        )
    options = {k: v for k, v in source.items() if not k.startswith("_")}
    refuse_unknown(options, inspect.signature(kind.__init__).parameters, owner=str(name))
    return kind(**options).to(dtype), dict(source)


def import_diffusers() -> Any:
    """The module diffusers, or an error that says how to install it."""
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("diffusion models need diffusers: pip install 'qlightning[diffusion]'") from error
    return diffusers
