"""Allocation: which layer gets how many bits."""

from qlightning.lazy import at_first_use

_HOME = {
    "Allocation": "program",
    "Option": "sensitivity",
    "allocate": "program",
    "measure_sensitivity": "sensitivity",
}

__all__ = sorted(_HOME)
__getattr__, __dir__ = at_first_use(__name__, _HOME)
