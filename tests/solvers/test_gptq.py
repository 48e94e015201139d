"""GPTQ on the quantizers' own grids."""

import pytest
import torch
from torch import nn

from qlightning.layers.convert import convert
from qlightning.numerics.spec import parse
from qlightning.solvers import GPTQ, LDLQ, RTN, Moments, calibrate, fix_scales
from qlightning.solvers.commit import rounded

SPECS = [
    "int3",
    "int2-g8",
    "int4-g4-asym",
    "int4-lsq",
    "int3-g8-asym-learned",
    "ternary",
    "nf4-g8",
    "int4-b2x4",
    "int8",
]
NONE = torch.Generator()


def quantizer_for(weight, spec):
    quantizer = parse(spec)
    holder = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    holder[0].weight.data.copy_(weight)
    convert(holder, {"0": quantizer})
    fix_scales(holder)
    return holder[0].quantizer("weight")


def solve(solver, weight, moments, quantizer):
    return solver.solve(weight, moments, quantizer=quantizer, generator=NONE).values


@pytest.mark.parametrize("spec", SPECS)
def test_the_solution_is_on_the_grid_and_better_than_rounding(small, spec):
    weight, x = small.problem(rows=48)
    moments = Moments((x.T @ x).double()[None], len(x))
    quantizer = quantizer_for(weight, spec)
    for solver in (GPTQ(), GPTQ(order="activation"), GPTQ(block=4), LDLQ(), LDLQ(greedy=2)):
        values = solve(solver, weight, moments, quantizer)
        assert torch.equal(rounded(quantizer, values), values)
        assert moments.loss(values - weight) < moments.loss(rounded(quantizer, weight) - weight)


@pytest.mark.parametrize("spec", SPECS)
def test_without_correlation_every_solver_is_rounding(small, spec):
    weight, _ = small.problem()
    quantizer = quantizer_for(weight, spec)
    for solver in (RTN(), GPTQ(), GPTQ(order="activation"), LDLQ(), LDLQ(greedy=3), LDLQ(order="activation")):
        values = solve(solver, weight, Moments(torch.eye(16, dtype=torch.float64)[None]), quantizer)
        assert torch.equal(values, rounded(quantizer, weight))


def test_gptq_is_ldlq(small):
    for seed in range(5):
        weight, x = small.problem(seed=seed)
        moments = Moments((x.T @ x).double()[None], len(x))
        quantizer = quantizer_for(weight, "int8")  # nothing saturates
        assert torch.equal(solve(GPTQ(), weight, moments, quantizer), solve(LDLQ(), weight, moments, quantizer))


def test_the_scale_of_the_moments_does_not_matter(small):
    weight, x = small.problem()
    quantizer = quantizer_for(weight, "int3")
    one, other = (Moments(f * (x.T @ x).double()[None], 1.0) for f in (1.0, 2.0**20))
    assert torch.equal(solve(GPTQ(), weight, one, quantizer), solve(GPTQ(), weight, other, quantizer))


def test_every_group_of_channels_has_its_own_inputs(small):
    weight, x = small.problem(rows=6)
    _, y = small.problem(rows=6, seed=1)
    quantizer = quantizer_for(weight, "int3")
    grams = [(x.T @ x).double(), (y.T @ y).double()]
    both = solve(GPTQ(), weight, Moments(torch.stack(grams), len(x)), quantizer)
    alone = [solve(GPTQ(), weight, Moments(gram[None], len(x)), quantizer) for gram in grams]
    assert torch.equal(both, torch.cat([alone[0][:3], alone[1][3:]]))


def test_inputs_that_are_always_zero_are_rounded(small):
    weight, x = small.problem()
    x[:, 5] = 0
    quantizer = quantizer_for(weight, "int3")
    values = solve(GPTQ(), weight, Moments((x.T @ x).double()[None], len(x)), quantizer)
    assert torch.equal(values[:, 5], rounded(quantizer, weight)[:, 5])
    silent = Moments(torch.zeros(1, 16, 16, dtype=torch.float64))
    assert torch.equal(solve(GPTQ(), weight, silent, quantizer), rounded(quantizer, weight))


def test_a_linear_layer_loses_less(small):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16))
    data = torch.randn(256, 32) @ torch.randn(32, 32)
    exact = model(data).detach()
    errors = {}
    for solver in (RTN(), GPTQ()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 16))
        convert(model, "int3-g16")
        report = calibrate(model, [data], solver)
        errors[solver] = float((model(data).detach() - exact).square().sum())
        assert report.sites[0].after * float((exact - model[0].bias.detach()).square().sum()) == pytest.approx(
            errors[solver], rel=1e-3
        )
    rtn, gptq = errors.values()
    assert gptq < 0.7 * rtn


@pytest.mark.parametrize("arguments", [{"damping": -1}, {"block": 0}, {"order": "random"}, {"commit": "frozen"}])
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match=r"GPTQ\("):
        GPTQ(**arguments)


def test_a_solver_is_described_by_its_arguments():
    assert repr(GPTQ(order="activation", batches=4)) == "GPTQ(order='activation', batches=4)"
    assert GPTQ(damping=0.1) == GPTQ(damping=0.1) != GPTQ()
