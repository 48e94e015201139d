"""Benchmark: what quantization-aware training costs on this machine, beside plain training and beside other tools.

workload.py (what is trained) x contestant.py, peers.py (how) -> clock.py (side by side) -> result.py (ratios)
"""

from qlightning.lazy import at_first_use

_HOME = {"Plain": "contestant", "Result": "result", "Ours": "contestant", "bench": "command", "workload": "workload"}

__all__ = sorted(_HOME)
__getattr__, __dir__ = at_first_use(__name__, _HOME)
