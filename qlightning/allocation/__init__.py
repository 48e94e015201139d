"""Allocation: which layer gets how many bits."""

from importlib import import_module
from typing import Any

_HOME = {
    "Allocation": "program",
    "Option": "sensitivity",
    "allocate": "program",
    "measure_sensitivity": "sensitivity",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"qlightning.allocation has no {name!r}; it has {', '.join(_HOME)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
