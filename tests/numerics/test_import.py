"""Law 7: numerics imports torch and nothing else."""

import json
import subprocess
import sys

HEAVY = [
    "lightning",
    "lightning_fabric",
    "pytorch_lightning",
    "transformers",
    "peft",
    "torchvision",
    "torchao",
    "scipy",
]


def test_numerics_imports_torch_and_nothing_else():
    script = """
import json, sys
import torch
before = set(sys.modules)
import qlightning.numerics
from qlightning.numerics import parse
parse("int4-g8")(torch.zeros(2, 8))
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    added = json.loads(run.stdout)
    packages = {name.partition(".")[0] for name in added}
    assert packages - set(sys.stdlib_module_names) <= {"qlightning", "torch"}
    assert not packages & set(HEAVY)
    ours = {name for name in added if name.startswith("qlightning")}
    assert all(name in ("qlightning", "qlightning.lazy") or name.startswith("qlightning.numerics") for name in ours)
