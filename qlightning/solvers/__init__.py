"""Solvers: how quantized weights are found from data, without the task's loss.

`calibrate(module, batches, GPTQ())` is the one entry; every solver is a plugin of the engine behind it.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "AWQ": "awq",
    "ApiQ": "apiq",
    "BlockAP": "block_ap",
    "BlockSolver": "solver",
    "CalibrationReport": "report",
    "Fixed": "fixed",
    "GPTQ": "gptq",
    "LDLQ": "ldlq",
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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"qlightning.solvers has no {name!r}; it has {', '.join(_HOME)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
