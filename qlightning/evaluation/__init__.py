"""Evaluation: numbers about a model."""

from qlightning.lazy import at_first_use

_HOME = {
    "BucketedMean": "bucketed_mean",
    "HeldOut": "held_out",
}

__all__ = sorted(_HOME)
__getattr__, __dir__ = at_first_use(__name__, _HOME)
