"""Forward-only training: the estimate, the way back, the random numbers, the memory."""

import copy
import os
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlightning.layers.convert import convert
from qlightning.optim import ZerothOrder

A = torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=torch.float64)


def theta(size=4, dtype=torch.float64):
    return nn.Parameter(torch.linspace(-1, 1, size, dtype=dtype))


def test_the_estimate_is_unbiased_for_a_linear_loss():
    """E[g z] = a for L = a . theta, over the directions of many steps."""
    p = theta()
    start = p.detach().clone()
    optimizer = ZerothOrder([p], lr=1.0, eps=0.5)
    steps = 1000
    for _ in range(steps):
        optimizer.step(lambda: A @ p)
    mean = (start - p.detach()) / steps
    # the variance of g z in one coordinate is |a|^2 + a_i^2
    sigma = ((A.square().sum() + A.square()) / steps).sqrt()
    assert bool(((mean - A).abs() < 4 * sigma).all())
    assert bool((sigma < 0.16).all())


def test_one_step_goes_exactly_along_one_direction():
    p = theta()
    start = p.detach().clone()
    places = []

    def loss():
        places.append(p.detach().clone())
        return A @ p

    value = ZerothOrder([p], lr=0.1, eps=0.01, seed=5).step(loss)
    z = (places[0] - places[1]) / 0.02
    torch.testing.assert_close(places[0] - start, 0.01 * z)
    torch.testing.assert_close(start - p.detach(), 0.1 * (A @ z) * z)  # g = a . z exactly
    assert value == pytest.approx(float(A @ start))
    assert z.abs().max() > 0.1


def test_the_seed_decides_everything():
    def run(seed, steps=5):
        p = theta()
        optimizer = ZerothOrder([p], lr=0.1, eps=0.1, seed=seed)
        for _ in range(steps):
            optimizer.step(lambda: (p - 1).square().sum())
        return p.detach(), optimizer

    torch.manual_seed(3)
    first, _ = run(7)
    torch.manual_seed(4)
    assert torch.equal(first, run(7)[0])
    assert not torch.equal(first, run(8)[0])


def test_resume_is_exact():
    def optimizer_of(p):
        return ZerothOrder([p], lr=0.1, eps=0.1)

    p = theta()
    optimizer = optimizer_of(p)
    for step in range(6):
        if step == 3:
            saved, state = p.detach().clone(), copy.deepcopy(optimizer.state_dict())
        optimizer.step(lambda: (p - 1).square().sum())
    q = nn.Parameter(saved)
    again = optimizer_of(q)
    again.load_state_dict(state)
    for _ in range(3):
        again.step(lambda: (q - 1).square().sum())
    assert torch.equal(p, q)


@pytest.mark.parametrize("restore", ["copy", "regenerate"])
def test_the_way_back(restore):
    """Without a learning rate nothing moves: bit for bit from a copy, up to rounding otherwise."""
    p = nn.Parameter(torch.randn(2000, generator=torch.Generator().manual_seed(0)))
    start = p.detach().clone()
    optimizer = ZerothOrder([p], lr=0.0, eps=1e-3, restore=restore)
    for _ in range(20):
        optimizer.step(lambda: p.square().sum())
    if restore == "copy":
        assert torch.equal(p, start)
    else:
        assert not torch.equal(p, start)
        torch.testing.assert_close(p.detach(), start, rtol=0, atol=1e-5)


def test_both_ways_step_alike():
    def run(restore):
        p = theta()
        ZerothOrder([p], lr=0.1, eps=0.1, restore=restore).step(lambda: (p - 1).square().sum())
        return p.detach()

    torch.testing.assert_close(run("copy"), run("regenerate"))


def test_both_losses_see_the_same_random_numbers():
    p = theta()
    optimizer = ZerothOrder([p], lr=0.0, eps=0.25)
    drawn = []

    def noisy():
        drawn.append(torch.rand(()))
        return A @ p + 100 * drawn[-1]

    optimizer.step(noisy)
    assert drawn[0] == drawn[1]
    noise = (optimizer.probe.plus - optimizer.probe.minus) / 0.5
    plain = ZerothOrder([p], lr=0.0, eps=0.25)
    plain.step(lambda: A @ p)
    assert noise == pytest.approx((plain.probe.plus - plain.probe.minus) / 0.5, abs=1e-4)
    optimizer.step(noisy)
    assert drawn[2] != drawn[0]


def test_what_is_frozen_stays_and_groups_have_their_own_steps():
    a, b, frozen = theta(), theta(), theta()
    frozen.requires_grad_(False)
    starts = [p.detach().clone() for p in (a, b, frozen)]
    optimizer = ZerothOrder([{"params": [a, frozen]}, {"params": [b], "lr": 0.0}], lr=0.1, eps=0.1)
    seen = []

    def loss():
        seen.append((b.detach().clone(), frozen.detach().clone()))
        return a.sum() + b.sum()

    optimizer.step(loss)
    assert not torch.equal(a, starts[0])
    assert torch.equal(b, starts[1])
    assert not torch.equal(seen[0][0], starts[1])
    assert torch.equal(frozen, starts[2])
    assert torch.equal(seen[0][1], starts[2])


class Peak(TorchDispatchMode):
    """Bytes of the tensors that are alive at once, of those made inside."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in old and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = size = storage.nbytes()
                    self.now += size
                    weakref.finalize(storage, self._gone, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key):
        self.now -= self.alive.pop(key, 0)


@pytest.mark.parametrize("restore", ["copy", "regenerate"])
def test_a_step_costs_inference_and_one_copy_of_what_is_trained(restore):
    """No tensor is saved for backward, no state is kept; beside a forward pass there is the copy and one direction."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.ReLU())))
    convert(model, {"*": "int4-channel", "10": None})
    x, saved = torch.randn(128, 64), []
    optimizer = ZerothOrder(model.parameters(), restore=restore)

    def loss():
        return model(x).square().mean()

    with torch.no_grad(), Peak() as inference:
        loss()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        with Peak() as step:
            optimizer.step(loss)
        assert not saved
        with Peak() as backward:
            loss().backward()
    assert saved
    assert not optimizer.state
    parameters = sum(p.nbytes for p in model.parameters())
    allowed = parameters if restore == "copy" else 0
    largest = max(p.nbytes for p in model.parameters())
    assert step.peak <= inference.peak + allowed + largest
    assert step.peak >= inference.peak + allowed  # the measurement sees what is there
    assert backward.peak > inference.peak + parameters


def test_it_trains_a_quantized_model_whose_rounding_has_no_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    convert(model, "int6-channel")
    x = torch.randn(64, 4)
    y = x[:, :1] * 0.5 - x[:, 1:2] * 0.3
    optimizer = ZerothOrder(model.parameters(), lr=0.005, eps=0.03)

    def loss():
        return (model(x) - y).square().mean()

    before = float(loss().detach())
    for _ in range(300):
        optimizer.step(loss)
    assert float(loss().detach()) < 0.5 * before


def test_what_cannot_work():
    p = theta()
    optimizer = ZerothOrder([p], lr=0.1)
    with pytest.raises(ValueError, match=r"write optimizer\.step\(lambda: loss\(batch\)\)"):
        optimizer.step()
    start = p.detach().clone()
    with pytest.raises(ValueError, match="returned no loss"):
        optimizer.step(lambda: None)
    with pytest.raises(ValueError, match="loss of the perturbed model is nan: take a smaller eps"):
        optimizer.step(lambda: p.sum() * float("nan"))
    assert torch.equal(p, start)
    with pytest.raises(ValueError, match=r"torch\.bfloat16, in which small updates are lost"):
        ZerothOrder([theta(dtype=torch.bfloat16)]).step(lambda: 0.0)
    with pytest.raises(ValueError, match="none requires a gradient"):
        ZerothOrder([theta().requires_grad_(False)]).step(lambda: 0.0)
    with pytest.raises(ValueError, match=r"eps=0\.0: write for example ZerothOrder"):
        ZerothOrder([p], eps=0.0)
    with pytest.raises(ValueError, match="restore='copy' or restore='regenerate'"):
        ZerothOrder([p], restore="maybe")


def _rank(rank, store, queue):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    p = theta()
    optimizer = ZerothOrder([p], lr=0.1, eps=0.1)
    for _ in range(3):
        optimizer.step(lambda: (p - 3 * rank).square().sum())
    queue.put((rank, p.detach().tolist(), optimizer.probe))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its processes by fork")
def test_processes_average_the_losses(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_rank, args=(rank, tmp_path / "store", queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = sorted(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    p = theta()
    optimizer = ZerothOrder([p], lr=0.1, eps=0.1)
    for _ in range(3):
        optimizer.step(lambda: (p.square().sum() + (p - 3).square().sum()) / 2)
    assert results[0][1:] == results[1][1:]
    torch.testing.assert_close(torch.tensor(results[0][1], dtype=torch.float64), p.detach())
