"""Every kernel against its twin, under Triton's interpreter on the CPU, and on the GPU where there is one.

Triton decides when it is imported whether it interprets, so all checks run in one process of their own.
"""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CHECKS = [
    "fake_quantize_measures",
    "fake_quantize_on_a_given_scale",
    "fake_quantize_shows_nan",
    "fake_quantize_backward",
    "codes_of_columns",
    "encoded_operands_are_turned_in_the_kernel",
    "hadamard_quantize",
    "hadamard_alone",
    "unpack_int4",
    "packed_codes_are_decoded_by_it",
    "scaled_product",
    "grouped_product",
    "scaled_product_by_descriptors",
    "quantizers_take_them",
]


@functools.cache
def results(device: str) -> dict[str, str]:
    """What each check said: "" where it passed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]), "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    call = [sys.executable, "-W", "ignore", str(HERE / "checks.py"), device]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=600)
    lines = [line.partition("\t") for line in done.stdout.splitlines() if "\t" in line]
    assert lines, done.stderr
    return {name: said for name, _, said in lines}


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
@pytest.mark.parametrize("check", CHECKS)
def test_a_kernel_equals_its_twin_under_the_interpreter(check: str) -> None:
    assert results("cpu")[check] == ""
    assert len(results("cpu")) == len(CHECKS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("check", [*CHECKS, "scaled_product_is_compiled"])
def test_a_kernel_equals_its_twin_on_the_gpu(check: str) -> None:
    assert results("cuda")[check] == ""
