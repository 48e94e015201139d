"""Export: one artifact out, proven equal to the trained model in the runtime that will serve it.

    checkpoint -> trained.py (what was trained) -> plain.py, compressed_tensors.py ... -> verify.py (the proof)

`target.py` says how to add a target.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "ExportCallback": "callback",
    "Target": "target",
    "Tolerance": "target",
    "Trained": "trained",
    "export_checkpoint": "commands",
    "export_module": "commands",
    "verify": "commands",
    "verify_module": "commands",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"qlightning.export has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
