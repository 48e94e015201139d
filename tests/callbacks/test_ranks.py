"""What processes have of their own, in checkpoints."""

from types import SimpleNamespace

import torch
from lightning.pytorch import LightningModule
from torch import nn

from qlightning.callbacks.ranks import own_states, restore_own
from qlightning.layers.convert import convert, quantizers_of


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)
        convert(self, {"*": {"weight": "int4", "input": "int8-tensor-lsq"}})
        self.quantizer = dict(quantizers_of(self))["layer.input_quantizer"]
        self.forward = self.layer.forward
        self.quantizer.enabled, self.quantizer.observing = False, True


def trainer(rank=0, size=1):
    strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: _summed(tensor))
    return SimpleNamespace(world_size=size, global_rank=rank, is_global_zero=rank == 0, strategy=strategy)


def _summed(tensor):
    torch.distributed.all_reduce(tensor)
    return tensor


def observed(net):
    return {name: value.clone() for name, value in net.quantizer.scale.named_buffers()}


def test_random_numbers_of_one_process():
    net = Net()
    states = own_states(trainer(), net)
    wanted = torch.rand(3)
    restore_own(states, trainer(), net)
    assert torch.equal(torch.rand(3), wanted)


def test_every_rank_goes_on_with_its_own(ranks):
    def check():
        rank = torch.distributed.get_rank()
        torch.manual_seed(rank)
        net = Net()
        net(torch.full((2, 8), rank + 1.0))
        before = observed(net)
        states = own_states(trainer(rank, 2), net)
        assert all(torch.equal(value, before[name]) for name, value in observed(net).items())
        wanted = torch.rand(3)
        other = Net()
        restore_own(states, trainer(rank, 2), other)
        assert torch.equal(torch.rand(3), wanted)
        assert all(torch.equal(value, before[name]) for name, value in observed(other).items())
        return states, before

    (states, first), (same, second) = ranks(2, check)
    assert not torch.equal(first["total_value"], second["total_value"])
    assert torch.equal(states["of"][1]["observed"]["layer.input"]["total_value"], second["total_value"])
    assert torch.equal(same["pooled"]["layer.input"]["count"], torch.tensor([2.0]))

    # on another number of processes: what all observed counts once
    net, numbers = Net(), torch.get_rng_state()
    restore_own(states, trainer(), net)
    assert torch.equal(torch.get_rng_state(), numbers)
    torch.testing.assert_close(2 * observed(net)["total_value"], first["total_value"] + second["total_value"])
    assert float(observed(net)["count"]) == 1.0  # one step, of two processes then and of one now
    restore_own(states, trainer(2, 3), net)
    assert float(observed(net)["count"]) == 0.0
