"""SQNR against the formula in numpy, and at its ends."""

import numpy as np
import pytest
import torch

from qlightning.evaluation import sqnr as module
from qlightning.evaluation.sqnr import decibels, sqnr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1 << 22, 5])
def test_it_is_the_formula(dtype, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    x = torch.randn(9, 7).to(dtype)
    y = (x * 4).round() / 4
    a, b = x.double().numpy(), y.double().numpy()
    assert sqnr(x, y) == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()))


def test_the_ends():
    assert sqnr(torch.ones(3), torch.ones(3)) == float("inf")
    assert sqnr(torch.zeros(3), torch.ones(3)) == float("-inf")
    assert decibels(1.0, 10.0) == -10.0
