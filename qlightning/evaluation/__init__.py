"""Evaluation: numbers about a model."""

from importlib import import_module
from typing import Any

_HOME = {
    "BucketedMean": "bucketed_mean",
    "HeldOut": "held_out",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"qlightning.evaluation has no {name!r}; it has {', '.join(_HOME)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
