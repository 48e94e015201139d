"""A small net on several processes, for the tests of the strategies."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import mse_loss

import qlightning
from qlightning.strategies.plan import Plan
from qlightning.strategies.shard import shard, units_of
from qlightning.strategies.shard_gradients import finished_on_shards


class Net(nn.Module):
    def __init__(self, width=32, rows=16):
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(width, rows, bias=False), nn.Tanh(), nn.Linear(rows, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(self.blocks(x))


def data(step, ranks, rank=None):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(2, 12, 32, generator=generator)
    if rank is None:
        return x, y
    share = len(x) // ranks
    return x[rank * share : (rank + 1) * share], y[rank * share : (rank + 1) * share]


def train(net, ranks=1, rank=None, gathers=(), steps=4, lr=0.02):
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        x, y = data(step, ranks, rank)
        loss = mse_loss(net(x), y)
        with finished_on_shards(gathers):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def converted(spec, **scheme):
    torch.manual_seed(1)
    net = Net()
    qlightning.convert(net, {"*": qlightning.Scheme(spec, **scheme)})
    return net


def sharded(net, *, codes=True, replicas=1):
    """(plan, gathers) of a net that is sharded in place, between all ranks or each of several groups of them."""
    count = dist.get_world_size() // replicas
    sizes, names = ((count,), None) if replicas == 1 else ((replicas, count), ("replicate", "shard"))
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    plan = Plan(net, ranks=count)
    shard([net], units_of(net), mesh)
    gathers = plan.attach(net) if codes else []
    for gather in gathers:
        gather.attach()
    return plan, gathers


def whole(net):
    named = net.named_parameters()
    return {name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in named}


@pytest.fixture
def kit():
    return SimpleNamespace(Net=Net, train=train, converted=converted, sharded=sharded, whole=whole)
