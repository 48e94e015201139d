"""The state in which a model is calibrated; the rest of what is restored is in test_engine.py."""

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn

from qlightning.layers.convert import convert
from qlightning.solvers.quiet import quiet


def test_everything_is_restored_even_after_an_error():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4))
    convert(model, "int4")
    model[0].eval()
    quantizers = [layer.quantizer("weight") for layer in (model[0], model[2])]
    quantizers[1].enabled, quantizers[1].observing = False, True
    torch.set_float32_matmul_precision("medium")
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    try:
        with contextlib.suppress(KeyError), torch.autocast("cpu", torch.bfloat16), quiet(model):
            assert not any(child.training for child in model.modules())
            assert not any(q.enabled or q.observing for q in quantizers)
            assert not torch.is_grad_enabled()
            assert not torch.is_autocast_enabled("cpu")
            assert torch.get_float32_matmul_precision() == "highest"
            torch.rand(1), np.random.rand(), random.random()
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.is_grad_enabled()
    assert [child.training for child in model] == [False, True, True]
    assert [(q.enabled, q.observing) for q in quantizers] == [(True, False), (False, True)]
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_logging_of_a_module_is_silent_inside():
    class Logs(nn.Module):
        def training_step(self, batch):
            self.log("loss", 1)

        def log(self, name, value):
            raise AssertionError("logged")

        def log_dict(self, values):
            raise AssertionError("logged")

    module = Logs()
    with quiet(module):
        module.training_step(None)
        module.log_dict({}, prog_bar=True)
    with pytest.raises(AssertionError, match="logged"):
        module.log("loss", 1)


def test_compiled_code_is_not_run_inside():
    model = nn.Sequential(nn.Linear(4, 4))
    convert(model, "int4")
    model[0].compile(backend=lambda graph, inputs: pytest.fail("compiled"))
    with quiet(model):
        model(torch.randn(2, 4))
