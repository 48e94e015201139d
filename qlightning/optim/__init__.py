"""Optimizers, and what acts on weights between the gradient and the step or after it."""

from qlightning.lazy import at_first_use

_HOME = {
    "Cage": "cage",
    "Weight": "weights",
    "ZerothOrder": "zeroth_order",
    "pull_strength": "cage",
    "weights_in": "weights",
    "weights_of": "weights",
}

__all__ = sorted(_HOME)
__getattr__, __dir__ = at_first_use(__name__, _HOME)
