"""LDLQ's variants; that it is GPTQ is shown in test_gptq.py, its expected losses in test_sweep.py."""

import pytest
import torch

from qlightning.numerics.spec import parse
from qlightning.solvers import LDLQ, Moments
from qlightning.solvers.commit import rounded
from qlightning.solvers.ldlq import stochastic


def case(small, spec="int2-learned"):
    weight, x = small.problem()
    quantizer = parse(spec)
    quantizer.build(tuple(weight.shape))
    quantizer.initialize(weight)
    return weight, Moments((x.T @ x).double()[None], len(x)), quantizer


def test_greedy_passes_never_hurt(small):
    weight, moments, quantizer = case(small)
    losses = []
    for passes in (0, 1, 5):
        solution = LDLQ(greedy=passes).solve(weight, moments, quantizer=quantizer, generator=torch.Generator())
        assert torch.equal(rounded(quantizer, solution.values), solution.values)
        losses.append(moments.loss(solution.values - weight))
    assert losses[2] <= losses[1] <= losses[0]
    assert losses[2] < losses[0]


def test_stochastic_rounding_is_drawn_from_the_generator(small):
    weight, moments, quantizer = case(small)
    found = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        solution = LDLQ(rounding="stochastic").solve(weight, moments, quantizer=quantizer, generator=generator)
        assert torch.equal(rounded(quantizer, solution.values), solution.values)
        found.append(solution.values)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_expectation_of_stochastic_rounding_is_the_position():
    position = torch.tensor([-1.25, 0.0, 0.9]).repeat(20_000, 1)
    drawn = stochastic(position, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), position[0], atol=0.02, rtol=0)
    assert set(drawn[:, 1].tolist()) == {0.0}


@pytest.mark.parametrize("arguments", [{"greedy": -1}, {"rounding": "up"}, {"order": "x"}])
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match=r"LDLQ\("):
        LDLQ(**arguments)
