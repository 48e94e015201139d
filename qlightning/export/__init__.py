"""Export: one artifact out, proven equal to the trained model in the runtime that will serve it.

    checkpoint -> trained.py (what was trained) -> plain.py, compressed_tensors.py ... -> verify.py (the proof)

`target.py` says how to add a target.
"""

from qlightning.lazy import at_first_use

_HOME = {
    "ExportCallback": "callback",
    "Target": "target",
    "Tolerance": "target",
    "Trained": "trained",
    "export_checkpoint": "commands",
    "export_module": "commands",
    "verify": "commands",
    "verify_module": "commands",
}

__all__ = sorted(_HOME)
__getattr__, __dir__ = at_first_use(__name__, _HOME)
