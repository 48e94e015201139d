"""A kept step by itself; what going back does to a run is in test_finite.py."""

import copy

import torch
from lightning.pytorch import Callback

from qlightning import QATCallback
from qlightning.callbacks.kept_step import KeptStep


class Returns(Callback):
    """Keeps step 2, and is back in it after the fourth and the sixth batch."""

    def __init__(self):
        self.states, self.batch = [], 0

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self.batch == 2:
            buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
            self.kept = KeptStep(trainer, module, buffers=buffers, rates=[[0.5] * len(optimizer.param_groups)])
            self.states.append(self.state(trainer, module))

    def on_train_batch_end(self, trainer, module, *args):
        self.batch += 1
        if self.batch in (4, 6):
            self.kept.put_back(trainer, module)
            self.states.append(self.state(trainer, module))
            assert {group["lr"] for group in trainer.optimizers[0].param_groups} == {0.5}
            assert trainer.global_step == self.kept.step == 2

    def state(self, trainer, module):
        state = trainer.optimizers[0].state
        memory = [value for p in module.parameters() for value in state[p].values()]
        return copy.deepcopy([*module.state_dict().values(), *memory])


def test_it_can_be_gone_back_to_again_and_again(kit):
    returns = Returns()
    kit.fit(kit.Net(), QATCallback("int4-lsq", "int8-tensor-lsq", calibration=1), returns, max_steps=5)
    kept, first, second = returns.states
    assert all(torch.equal(one, other) for one, other in zip(kept, first, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(kept, second, strict=True))
    assert returns.batch == 9
