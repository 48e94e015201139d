"""Solvers at the start of a fit on several processes, each on its own share of the data, sharded or not."""

import pytest
import torch

from qlightning import QATCallback
from qlightning.callbacks.allocation import AllocationCallback, finest
from qlightning.layers.sharding import whole
from qlightning.solvers import AWQ, GPTQ
from qlightning.strategies.fsdp import QuantizedFSDP


def qat(solver, start=0):
    return QATCallback("int3-g8", rules={"body.first": None, "body.last": None}, init=solver, start=start)


def outcome(kit, solver, strategy, start=0):
    """Losses of the run's first steps and all parameters behind them."""
    losses, trainer = kit.fit(qat(solver, start), strategy=strategy, steps=3)
    module = trainer.lightning_module
    with whole(module):
        return losses, {name: p.detach().clone() for name, p in module.named_parameters()}


def test_weights_are_those_that_one_process_finds(ranks, kit):
    """Four batches of four samples on two processes are two of eight on one."""

    def check():
        return {
            "ddp": outcome(kit, GPTQ(batches=4), "ddp"),
            "fsdp2": outcome(kit, GPTQ(batches=4), "fsdp2"),
            "QuantizedFSDP": outcome(kit, GPTQ(batches=4), QuantizedFSDP()),
            "later": outcome(kit, GPTQ(batches=4), QuantizedFSDP(), start=2),
        }

    wanted = {start: outcome(kit, GPTQ(batches=2), "auto", start=start) for start in (0, 2)}
    unsolved, _ = kit.fit(qat(None), strategy="auto", steps=1)
    assert abs(unsolved[0] - wanted[0][0][0]) > 1e-3  # the solver is seen in the very first loss
    first, second = ranks(2, check)
    for name, (losses, parameters) in first.items():
        expected, its = wanted[2 if name == "later" else 0]
        assert losses == pytest.approx(expected, rel=1e-4), name
        for key, value in its.items():
            torch.testing.assert_close(parameters[key], value, rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")
            assert torch.equal(second[name][1][key], parameters[key]), (name, key)


def test_fsdp1_is_refused_before_anything_runs(ranks, kit):
    def check():
        with pytest.raises(ValueError, match=r"strategy='ddp' or qlightning\.QuantizedFSDP\(\).*calibrate\(module"):
            kit.fit(QATCallback("int3-g8", init=AWQ(batches=1), start=2), strategy="fsdp1", steps=3)

    ranks(2, check)


def test_allocation_with_a_solver(ranks, kit):
    candidates = ["int2-channel-asym-learned", "int8-channel-asym-learned"]

    def fit():
        finder = AllocationCallback(candidates, 6.0, batches=1, solver=GPTQ(batches=2))
        _, trainer = kit.fit(QATCallback(finest(candidates)), finder, steps=1)
        return finder.allocation, {n: p.detach().clone() for n, p in trainer.lightning_module.named_parameters()}

    (allocation, parameters), other = ranks(2, fit)
    assert len(set(allocation.values())) == 2
    assert other[0] == allocation
    assert all(torch.equal(other[1][name], value) for name, value in parameters.items())
