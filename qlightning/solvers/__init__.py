"""Solvers: how quantized weights are found from data, without the task's loss.

`calibrate(module, batches, GPTQ())` is the one entry; every solver is a plugin of the engine behind it.
"""

from qlightning.lazy import at_first_use

_HOME = {
    "AWQ": "awq",
    "AdaQuant": "adaquant",
    "ApiQ": "apiq",
    "BlockAP": "block_ap",
    "BlockSolver": "solver",
    "CalibrationReport": "report",
    "Fixed": "fixed",
    "GPTQ": "gptq",
    "LDLQ": "ldlq",
    "LET": "let",
    "Moments": "moments",
    "QuIP": "quip",
    "RTN": "rtn",
    "SiteSolution": "solver",
    "SiteSolver": "solver",
    "Solver": "solver",
    "calibrate": "engine",
    "fix_scales": "fixed",
}

__all__ = sorted(_HOME)
__getattr__, __dir__ = at_first_use(__name__, _HOME)
