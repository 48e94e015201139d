"""Quantization-aware training for PyTorch Lightning: one callback, any LightningModule, train = deploy.

Public names are imported at first use, so that `import qlightning` costs nothing and `qlightning.numerics` stays free
of Lightning.
"""

import importlib
import sys

from qlightning.lazy import at_first_use

__version__ = "0.1.0"

_HOME = {
    "QATCallback": "callbacks.qat",
    "Phase": "callbacks.phase",
    "ReportCallback": "callbacks.report",
    "DistillationCallback": "callbacks.distillation",
    "RegularizerCallback": "callbacks.regularizer",
    "TrajectoryCallback": "callbacks.trajectory",
    "OscillationCallback": "callbacks.oscillation",
    "WholeCheckpoints": "callbacks.checkpoint_io",
    "BackgroundCheckpoints": "callbacks.background",
    "EightBitAdam": "callbacks.eight_bit",
    "FiniteCallback": "callbacks.finite",
    "Raise": "callbacks.policies",
    "SkipStep": "callbacks.policies",
    "RestoreLastGood": "callbacks.policies",
    "ExportCallback": "export.callback",
    "PageCallback": "reporting.callback",
    "Quantizer": "numerics.quantizer",
    "Scheme": "layers.scheme",
    "CAGECallback": "callbacks.cage",
    "AllocationCallback": "callbacks.allocation",
    "ConfidenceAnnealing": "callbacks.oscillation",
    "ForwardOnly": "callbacks.forward_only",
    "Release": "callbacks.release",
    "OncePerStep": "callbacks.once_per_step",
    "Method": "methods.method",
    "compose": "methods.method",
    "QuantizedFSDP": "strategies.fsdp",
    "calibrate": "solvers",
    "convert": "layers.convert",
    "restore": "layers.convert",
    "parse": "numerics.spec",
}

__all__ = ["__version__", *_HOME]
__getattr__, __dir__ = at_first_use(__name__, _HOME)

if "lightning.pytorch" in sys.modules:  # from here on, every LightningModule loads converted checkpoints
    importlib.import_module("qlightning.callbacks.loading").install()
