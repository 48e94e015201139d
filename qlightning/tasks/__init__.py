"""Tasks: small LightningModules to train something with. Your own LightningModule is an equal citizen."""

from importlib import import_module
from typing import Any

_HOME = {
    "CausalLM": "causal_lm",
    "Diffusion": "diffusion",
    "ImageClassification": "image_classification",
    "adamw": "optimizer",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"qlightning.tasks has no {name!r}; it has {', '.join(_HOME)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
