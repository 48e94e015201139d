"""Schedules: what a run does when, as pure functions of the step."""

from importlib import import_module
from typing import Any

_HOME = {
    "Constant": "learning_rate",
    "Cosine": "learning_rate",
    "Restart": "learning_rate",
    "Schedule": "learning_rate",
    "WarmupStableDecay": "learning_rate",
    "to_steps": "steps",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"qlightning.schedules has no {name!r}; it has {', '.join(_HOME)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
