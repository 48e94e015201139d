"""Several processes find what one finds on the batches of all of them, and all find the same, bit for bit."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from qlightning.layers.convert import convert, quantizers_of
from qlightning.layers.sharding import whole
from qlightning.solvers import AWQ, GPTQ, LDLQ, LET, RTN, AdaQuant, ApiQ, BlockAP, QuIP, calibrate
from qlightning.solvers.batch_norm import reestimate
from qlightning.solvers.share import Share, share_of

SOLVERS = {
    "rtn": RTN(),
    "gptq": GPTQ(),
    "gptq on the float stream": GPTQ(stream="fp", order="activation"),
    "ldlq": LDLQ(greedy=1, rounding="stochastic"),
    "quip": QuIP(),
    "awq": AWQ(grid=4, clip_grid=4, then=LDLQ(rounding="stochastic")),
    "let": LET(steps=6, lr=0.05),
    "block-ap": BlockAP(epochs=2, weight_lr=1e-2, quant_lr=1e-2, held_out=0.4),
    "apiq by block": ApiQ(epochs=2, clip_lr=5e-2, target="both"),
    "apiq by layer": ApiQ(epochs=2, clip_lr=5e-2, level="layer"),
    "adaquant": AdaQuant(steps=10, weight_lr=1e-2, bias_lr=1e-2, held_out=0.4),
}
SHARDED = ("gptq", "awq", "block-ap", "apiq by layer", "adaquant")
EXACT = ("let", "block-ap", "apiq by block", "apiq by layer")
"""What they take from a batch travels as it is, and nothing is added in another order. AdaQuant learns beside scales of
inputs, which are means over the batches."""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """What it draws for a batch shows whether the batch has its number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.blocks = nn.Linear(8, 16), nn.ModuleList([Block(), Block()])
        for block in self.blocks:
            nn.init.normal_(block.norm.weight, 1.0, 0.5)

    def forward(self, x):
        x = self.first(x + 0.1 * torch.randn_like(x))
        for block in self.blocks:
            x = block(x)
        return x


def batches(count=5):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3 + i, 8, generator=generator) * torch.logspace(-1, 1, 8) for i in range(count)]


def make():
    net = Net()
    convert(net, {"*": {"weight": "int3-g8-asym", "input": "int8-tensor-lsq"}, "first": None})
    return net


def found_by(solver, data, net=None):
    """All that calibration leaves behind, by name, and its report."""
    net = make() if net is None else net
    report = calibrate(net, data, solver)
    with whole(net):
        tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        state = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    state["switches"] = torch.tensor([[q.enabled, q.ready] for _, q in quantizers_of(net)])
    return state, report


def shard(net):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def check_same(found, wanted, *, exact=False):
    (state, report), (other, its) = found, wanted
    assert state.keys() == other.keys()
    for name, tensor in other.items():
        observed = "input_quantizer" in name  # whose sums over batches are added in another order
        near = {"rtol": 0, "atol": 0} if exact and not observed else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(state[name], tensor, **near, msg=lambda text, name=name: f"{name}: {text}")
    assert (report.batches, report.solver) == (its.batches, its.solver)
    for row, same in zip(report.sites, its.sites, strict=True):
        assert (row.name, row.tokens, row.note) == (same.name, same.tokens, same.note)
        for one, other in ((row.before, same.before), (row.after, same.after), (row.changed, same.changed)):
            assert one is other is None or one == pytest.approx(other, rel=1e-5)
    assert [b.error for b in report.blocks] == pytest.approx([b.error for b in its.blocks], rel=1e-5)


@pytest.fixture(scope="module")
def of_one():
    return {name: found_by(solver, batches()) for name, solver in SOLVERS.items()}


@pytest.fixture(scope="module")
def of_two(ranks):
    """Three batches and two: (whole modules, modules sharded by FSDP2), of each process."""

    def check():
        mine = batches()[torch.distributed.get_rank() :: 2]
        kept = {name: found_by(solver, mine) for name, solver in SOLVERS.items()}
        return kept, {name: found_by(SOLVERS[name], mine, shard(make())) for name in SHARDED}

    return ranks(2, check)


@pytest.mark.parametrize("name", SOLVERS)
def test_two_processes_find_what_one_finds(of_one, of_two, name):
    (first, _), (second, _) = of_two
    check_same(first[name], of_one[name], exact=name in EXACT)
    for key, tensor in first[name][0].items():
        assert torch.equal(second[name][0][key], tensor), key
    changed = make().state_dict()["blocks.0.up.weight"] != first[name][0]["blocks.0.up.weight"]
    assert bool(changed.any()) == (name not in ("apiq by block", "apiq by layer"))  # which leave weights alone


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_module_is_calibrated_block_by_block(of_two, name):
    for kept, sharded in of_two:
        for key, tensor in kept[name][0].items():
            assert torch.equal(sharded[name][0][key], tensor), key


def test_four_processes_of_which_one_has_nothing(ranks):
    data, solvers = batches(), {name: SOLVERS[name] for name in ("gptq", "block-ap")}
    parts = [[0, 3], [1], [], [2, 4]]  # the first of each, then the second

    def check():
        mine = [data[i] for i in parts[torch.distributed.get_rank()]]
        return {name: found_by(solver, mine) for name, solver in solvers.items()}

    everywhere = ranks(4, check)
    for name, solver in solvers.items():
        check_same(everywhere[0][name], found_by(solver, data), exact=name in EXACT)
        for other in everywhere[1:]:
            assert all(torch.equal(other[name][0][key], tensor) for key, tensor in everywhere[0][name][0].items())


def test_what_all_read_alike_is_shared_out(ranks):
    def check():
        return found_by(GPTQ(batches=3), batches())

    for found in ranks(2, check):
        check_same(found, found_by(GPTQ(batches=3), batches()))


def test_processes_take_as_many_batches_together_as_one_would(ranks):
    def check():
        rank = torch.distributed.get_rank()
        (*data, _), share = share_of([batches(8)[i] for i in range(rank, 8, 2)], 5, torch.device("cpu"))
        return len(data) + 1, share.count(len(data)), [share.number(i) for i in range(len(data) + 1)]

    assert ranks(2, check) == [(3, 5, [0, 2, 4]), (2, 5, [1, 3])]


def test_a_calibration_goes_on_with_another_number_of_processes(ranks):
    states, uninterrupted = [], found_by(GPTQ(), batches())
    calibrate(make(), batches(), GPTQ(), on_block=lambda state: states.append(copy.deepcopy(state)))

    def check():
        net = make()
        calibrate(net, batches()[torch.distributed.get_rank() :: 2], GPTQ(), state=states[0])
        return net.state_dict()

    for found in ranks(2, check):
        for name in ("blocks.0.up.weight", "blocks.1.down.weight"):
            torch.testing.assert_close(found[name], uninterrupted[0][name], rtol=1e-5, atol=1e-6)


def test_what_one_process_finds_wrong_all_say(ranks):
    def said(data):
        with pytest.raises(ValueError, match=r"NaN|data") as raised:
            calibrate(make(), data, GPTQ())
        return str(raised.value)

    def check():
        rank = torch.distributed.get_rank()
        ill = [x if rank == 0 else x * float("nan") for x in batches(2)[rank::2]]
        return said(ill), said([])

    for nan, nothing in ranks(2, check):
        assert "process 1: block 'blocks.0' is given NaN" in nan
        assert "on batch 1" in nan
        assert "no calibration data" in nothing


def test_messages(ranks):
    """Gradients that are missing or in bfloat16, numbers in order, answers, generators and repaired tensors."""

    def check():
        rank = torch.distributed.get_rank()
        share = Share([2, 1], rank)
        like = [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(()), torch.zeros(1, 3)]
        given = [torch.tensor([0.1, 3.0], dtype=torch.bfloat16), None, torch.full((1, 3), 1 / 3)]
        gradients = share.gradients(1, lambda i: given if (rank, i) == (1, 0) else pytest.fail("not its batch"), like)
        same = all((a is b) or torch.equal(a, b) for a, b in zip(gradients, given, strict=True))
        numbers = share.over([2, 0, 1], lambda i: 10.0 * rank + i)
        generator = torch.Generator().manual_seed(0)
        drawn = share.decide(lambda: float(torch.rand((), generator=generator)), generator)
        after = float(torch.rand((), generator=generator))
        with pytest.raises(ValueError, match="no answer"):
            share.decide(lambda: raise_("no answer"))
        tensors = [torch.full((2, 3), 1.0 + rank).t(), torch.tensor(rank == 0), torch.ones(0)]
        share.agree(tensors)
        return same, [g.dtype for g in gradients if g is not None], numbers, (drawn, after), tensors

    def raise_(text):
        raise ValueError(text)

    (same, dtypes, numbers, drawn, tensors), other = ranks(2, check)
    assert same
    assert other[0]
    assert dtypes == [torch.bfloat16, torch.float32]
    assert numbers == other[2] == [1.0, 0.0, 10.0]
    generator = torch.Generator().manual_seed(0)
    assert drawn == other[3] == tuple(float(torch.rand((), generator=generator)) for _ in range(2))
    for found in (tensors, other[4]):
        assert torch.equal(found[0], torch.ones(3, 2))
        assert bool(found[1])


def test_statistics_of_norms(ranks):
    def make_norms():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))

    def check():
        rank = torch.distributed.get_rank()
        apart, alike = make_norms(), make_norms()
        reestimate(apart, batches()[rank::2])
        reestimate(alike, batches())
        with pytest.raises(ValueError, match=r"\[3, 2\] batches: give each as many, reestimate\(module, batches\[:2\]"):
            reestimate(nn.SyncBatchNorm.convert_sync_batchnorm(make_norms()), batches()[rank::2])
        with pytest.raises(ValueError, match="no data"):
            reestimate(make_norms(), [])
        return apart[1].state_dict(), alike[1].state_dict()

    alone = make_norms()
    reestimate(alone, batches())
    (apart, alike), others = ranks(2, check)
    for found, other in ((apart, others[0]), (alike, others[1])):
        torch.testing.assert_close(found, alone[1].state_dict())
        assert all(torch.equal(other[name], tensor) for name, tensor in found.items())
