"""Where a step leaves the finite numbers."""

import math

import pytest
import torch
from lightning.pytorch import Callback

from qlightning import QATCallback
from qlightning.callbacks.first_place import first_place
from qlightning.layers.convert import quantizers_of


class Asks(Callback):
    """Breaks something before the last step and asks where."""

    def __init__(self, breaks):
        self.breaks = breaks
        self.said, self.left_as_it_was = [], []

    def on_train_batch_start(self, trainer, module, batch, index):
        self.batch = batch, index

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == 2:
            self.breaks(module, *self.batch)
            before = torch.get_rng_state(), {name: buffer.clone() for name, buffer in module.named_buffers()}
            self.said.append(first_place(trainer, module, *self.batch))
            assert torch.equal(torch.get_rng_state(), before[0])
            assert all(torch.equal(buffer, before[1][name]) for name, buffer in module.named_buffers())


def nothing(module, batch, index):
    pass


def weight(module, batch, index):
    with torch.no_grad():
        module.net[2].weight[3] = math.inf


def scale(module, batch, index):
    with torch.no_grad():
        dict(quantizers_of(module))["net.2.input_quantizer"].scale.value.fill_(math.nan)


def inputs(module, batch, index):
    batch[0][0, 0] = math.nan


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (nothing, ""),
        (weight, "Run once more, it begins before net.2.weight_quantizer.scale, whose input is not finite"),
        (scale, "Run once more, it begins in net.2.input_quantizer.scale, whose output is not finite"),
        (inputs, "Run once more, it begins before net, whose input is not finite"),
    ],
)
def test_it_is_found(kit, breaks, said):
    asks, module = Asks(breaks), kit.Net(dropout=0.5)
    kit.fit(module, QATCallback("int8-channel", "int8-tensor-lsq", calibration=1), asks, max_steps=3)
    assert asks.said == [said]
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
