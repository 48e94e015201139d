"""Quantization-aware training for PyTorch Lightning: one callback, any LightningModule, train = deploy.

Public names are imported at first use, so that `import qlightning` costs nothing and `qlightning.numerics` stays free
of Lightning.
"""

import importlib
import sys
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "QATCallback": "qlightning.callbacks.qat",
    "Phase": "qlightning.callbacks.phase",
    "ReportCallback": "qlightning.callbacks.report",
    "DistillationCallback": "qlightning.callbacks.distillation",
    "RegularizerCallback": "qlightning.callbacks.regularizer",
    "OscillationCallback": "qlightning.callbacks.oscillation",
    "ExportCallback": "qlightning.export.callback",
    "Quantizer": "qlightning.numerics.quantizer",
    "Scheme": "qlightning.layers.scheme",
    "CAGECallback": "qlightning.callbacks.cage",
    "AllocationCallback": "qlightning.callbacks.allocation",
    "ConfidenceAnnealing": "qlightning.callbacks.oscillation",
    "ForwardOnly": "qlightning.callbacks.forward_only",
    "Release": "qlightning.callbacks.release",
    "Method": "qlightning.methods.method",
    "compose": "qlightning.methods.method",
    "calibrate": "qlightning.solvers",
    "convert": "qlightning.layers.convert",
    "restore": "qlightning.layers.convert",
    "parse": "qlightning.numerics.spec",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qlightning' has no attribute {name!r}; it has {', '.join(sorted(_PUBLIC))}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


if "lightning.pytorch" in sys.modules:  # from here on, every LightningModule loads converted checkpoints
    importlib.import_module("qlightning.callbacks.loading").install()
