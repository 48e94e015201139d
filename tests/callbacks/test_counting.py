"""Multiply-adds, counted in the first training batch."""

import pytest
import torch

from qlightning import QATCallback
from qlightning.callbacks.counting import Counting
from qlightning.layers.convert import convert


def test_the_coverage_counts_multiply_adds_by_hand(kit):
    qat = QATCallback("int4-g8", rules={"net.4": None})
    kit.fit(kit.Net(), qat, max_steps=2)
    assert qat.coverage.multiply_add_share == (8 * 16 + 16 * 16) / (8 * 16 + 16 * 16 + 16 * 4)
    weights = 8 * 16 + 16 + 16 * 16 + 16
    assert qat.coverage.weight_share == weights / (weights + 16 * 4)


def test_counted_once(kit):
    module = kit.Net()
    coverage, counting = convert(module, "int4-g8"), Counting()
    counting.begin(module, coverage)
    module(torch.zeros(3, 8))
    assert counting.end()
    assert coverage.multiply_add_share == 1.0
    counting.begin(module, coverage)
    assert not counting.end()


def test_an_error_in_the_batch_leaves_no_hook(kit):
    class Failing(kit.Net):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise RuntimeError("in the step")

    module = Failing()
    with pytest.raises(RuntimeError, match="in the step"):
        kit.fit(module, QATCallback("int4-g8"))
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
