"""What solvers are asked and given (tasks in a model: test_engine.py)."""

import pytest
import torch

from qlightning.solvers import GPTQ, LDLQ, RTN, ApiQ, QuIP
from qlightning.solvers.solver import main_output


@pytest.mark.parametrize("solver", [RTN, GPTQ, LDLQ, QuIP, ApiQ])
def test_every_solver_is_built_from_plain_arguments(solver):
    """As a YAML file writes them: init: {class_path: qlightning.solvers.GPTQ, init_args: {batches: 2, seed: 1}}."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--init", type=object | solver)
    name = f"qlightning.solvers.{solver.__name__}"
    parsed = parser.parse_object({"init": {"class_path": name, "init_args": {"batches": 2, "seed": 1}}})
    made = parser.instantiate(parsed).init
    assert made == solver(batches=2, seed=1)
    assert made.batches == 2


def test_the_main_output_is_the_first_real_tensor():
    x = torch.ones(2)
    assert main_output((torch.ones(1, dtype=torch.long), {"a": x, "b": torch.zeros(1)})) is x
