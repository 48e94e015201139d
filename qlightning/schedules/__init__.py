"""Schedules: what a run does when, as pure functions of the step."""

from qlightning.lazy import at_first_use

_HOME = {
    "Constant": "learning_rate",
    "Cosine": "learning_rate",
    "Restart": "learning_rate",
    "Schedule": "learning_rate",
    "WarmupStableDecay": "learning_rate",
    "to_steps": "steps",
}

__all__ = sorted(_HOME)
__getattr__, __dir__ = at_first_use(__name__, _HOME)
