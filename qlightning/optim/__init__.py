"""Optimizers, and what acts on weights between the gradient and the step or after it."""

from importlib import import_module
from typing import Any

_HOME = {
    "Cage": "cage",
    "Weight": "weights",
    "ZerothOrder": "zeroth_order",
    "pull_strength": "cage",
    "weights_of": "weights",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"qlightning.optim has no {name!r}; it has {', '.join(_HOME)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
