"""QuIP: its grid, its storage, and that it helps where it should (its expected losses: test_sweep.py)."""

import pytest
import torch
from torch import nn

from qlightning.capture import sites_of
from qlightning.layers.convert import convert
from qlightning.numerics.spec import parse
from qlightning.solvers import GPTQ, RTN, Moments, QuIP, calibrate
from qlightning.solvers.incoherence import Incoherence
from qlightning.solvers.quip import rebuild, rotated_hessian
from qlightning.solvers.sweep import damp


def solve(solver, weight, x, spec="int2"):
    moments = Moments((x.T @ x).double()[None], len(x))
    quantizer = parse(spec)
    quantizer.build(tuple(weight.shape))
    solution = solver.solve(weight, moments, quantizer=quantizer, generator=torch.Generator().manual_seed(0))
    return solution, moments


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("greedy", [0, 1])
def test_rotated_values_lie_on_one_uniform_grid(small, bits, greedy):
    weight, x = small.problem(rows=12)
    solution, _ = solve(QuIP(greedy=greedy), weight, x, f"int{bits}-g8")
    state = {name: tensor[0] for name, tensor in solution.state.items()}
    basis = Incoherence(seed=int(state["seed"]))
    rotated = basis(solution.values.double() * state["balance"].double())
    scale = float(state["scale"])
    grid = torch.linspace(-scale, scale, 2**bits, dtype=torch.float64)
    torch.testing.assert_close(rotated, grid[state["codes"].long()], rtol=1e-5, atol=1e-5 * scale)
    assert state["codes"].dtype == torch.uint8
    assert int(state["codes"].max()) <= 2**bits - 1
    rms = basis(weight.double() * state["balance"].double()).square().mean().sqrt()
    assert scale == pytest.approx(2.4 * float(rms), rel=1e-5)


def test_what_is_stored_is_the_weight(small):
    weight, x = small.problem(rows=12)
    solution, _ = solve(QuIP(), weight, x)
    assert not solution.on_grid
    assert QuIP.final
    assert torch.equal(rebuild(solution.state), solution.values)
    assert sum(t.numel() for t in solution.state.values()) == weight.numel() + weight.shape[1] + 3


def test_the_loss_is_the_same_in_both_bases(small):
    weight, x = small.problem(rows=12)
    h = (x.T @ x).double() / len(x)
    basis = Incoherence(seed=5)
    torch.testing.assert_close(basis.inverse(basis(weight)), weight)
    rotated = rotated_hessian(h, basis) - 1e-2 * torch.eye(16, dtype=torch.float64)
    error = basis(weight.double())
    ours = float((error @ rotated * error).sum()) * float(h.diagonal().mean())
    assert ours == pytest.approx(float((weight.double() @ h * weight.double()).sum()), rel=1e-5)


def test_balanced_channels_have_diagonals_alike(small):
    weight, x = small.problem(rows=12)
    h = (x.T @ x).double()
    balance = QuIP()._balance(weight.double(), h)
    inputs, weights = (h / balance / balance[:, None]).diagonal(), (weight.double() * balance).square().sum(0)
    torch.testing.assert_close(inputs / inputs.sum(), weights / weights.sum())
    assert torch.equal(QuIP(rescale="none")._balance(weight, h), torch.ones(16, dtype=torch.float64))


def test_two_bits_with_outliers_need_it(small):
    """Weights with rare large entries on a coarse grid: rounding in the rotated basis loses much less."""
    generator = torch.Generator().manual_seed(0)
    weight, x = small.problem(rows=32, columns=32, tokens=256)
    weight = weight * torch.where(torch.rand(32, 32, generator=generator) < 0.03, 20.0, 1.0)
    losses = {}
    for solver in (RTN(), GPTQ(), QuIP()):
        solution, moments = solve(solver, weight, x, "int2-tensor")
        losses[type(solver).__name__] = moments.loss(solution.values - weight) / moments.loss(weight)
    assert losses["QuIP"] < 0.5 * losses["GPTQ"]
    assert losses["QuIP"] < 0.5 * losses["RTN"]


def test_it_is_a_function_of_its_seed(small):
    weight, x = small.problem()
    moments = Moments((x.T @ x).double()[None], len(x))
    quantizer = parse("int2")
    found = [
        QuIP().solve(weight, moments, quantizer=quantizer, generator=torch.Generator().manual_seed(s)).values
        for s in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("make", ["llama", "convnet"])
def test_a_model_runs_on_its_values(small, make):
    make, batches = small.kinds()[make]
    model = make()
    report = calibrate(model, batches(), QuIP())
    for site in sites_of(model):
        assert not site.quantizer.enabled
        assert torch.equal(site.weight, rebuild(report.states[site.name]))
    assert all("quantizer is off" in row.note for row in report.sites)
    again = make()
    resumed = calibrate(again, batches(), QuIP())
    assert torch.equal(small.logits(model.eval()), small.logits(again.eval()))
    assert all(torch.equal(resumed.states[k]["codes"], v["codes"]) for k, v in report.states.items())


def test_inputs_that_are_always_zero():
    model = nn.Sequential(nn.Linear(16, 4))
    convert(model, "int2")
    report = calibrate(model, [torch.zeros(3, 16)], QuIP())
    assert torch.isfinite(model[0].weight).all()
    assert report.sites[0].after == 0


@pytest.mark.parametrize("arguments", [{"rho": 0}, {"greedy": -1}, {"rescale": "no"}, {"damping": -1}])
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match=r"QuIP\("):
        QuIP(**arguments)


def test_it_rounds_to_integers(small):
    weight, x = small.problem()
    with pytest.raises(ValueError, match="weight='int2'"):
        solve(QuIP(), weight, x, "nf4-g8")
    assert damp(torch.eye(2), 0.01)[1] == 0.01
