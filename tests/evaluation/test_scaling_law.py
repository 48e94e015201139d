"""The planner against the numbers that the paper's readers report, the law and its fit against synthetic runs."""

import itertools
import math

import numpy as np
import pytest
import torch

from qlightning.evaluation.scaling_law import (
    LossLaw,
    Run,
    compare_sizes,
    fit,
    fit_loss_law,
    fit_share,
    optimal_share,
    plan_qat,
    tokens_per_byte,
)

# Made up for these tests; nobody's fit.
LAW = LossLaw(
    *(1.6, 400.0, 0.3, 300.0, 0.32),
    *(1.2, 0.9),
    *(40.0, 0.6, 0.15, 0.4),
    *(8.0, 0.5, 0.1, 0.25, 0.15),
)


def test_the_reported_shares():
    """arXiv 2509.22935 as reported: 86M parameters, 2B tokens."""
    shares = [plan_qat(params=86e6, tokens=2e9, bits=bits).fraction for bits in (1, 2, 4, 6)]
    assert [round(share, 3) for share in shares] == [0.276, 0.227, 0.173, 0.141]
    assert round(optimal_share(1000), 3) == 0.377


def test_the_share_grows_with_tokens_and_falls_with_parameters_and_bits():
    shares = [optimal_share(s) for s in np.geomspace(1.1, 1e8, 60)]
    assert all(0 < a < b < 1 for a, b in itertools.pairwise(shares))
    fraction = plan_qat(params=1e9, tokens=1e11, bits=4).fraction
    assert fraction < plan_qat(params=1e9, tokens=2e11, bits=4).fraction
    assert fraction > plan_qat(params=2e9, tokens=1e11, bits=4).fraction
    assert fraction > plan_qat(params=1e9, tokens=1e11, bits=5).fraction
    assert fraction == plan_qat(params=2e9, tokens=1e11, bits=2).fraction  # only N * B matters


@pytest.mark.parametrize("tokens", [2e9, 1_000_003, 777_777_777, 1.4e12])
def test_phases_sum_to_the_budget(tokens):
    plan = plan_qat(params=tokens / 50, tokens=tokens, bits=4)
    assert plan.fp_tokens + plan.qat_tokens == round(tokens)
    assert plan.start == pytest.approx(1 - plan.fraction, abs=1 / tokens)


def test_it_says_when_it_extrapolates():
    assert plan_qat(params=1e9, tokens=1e11, bits=4).studied
    assert not plan_qat(params=5e6, tokens=1e9, bits=4).studied
    assert not plan_qat(params=1e9, tokens=1e13, bits=4).studied
    assert not plan_qat(params=1e9, tokens=1e11, bits=8).studied


def test_too_few_tokens():
    assert optimal_share(1.0) == optimal_share(0.1) == 0.0
    with pytest.raises(ValueError, match=r"holds well above 1; .*QATCallback\(start="):
        plan_qat(params=1e9, tokens=1e8, bits=4)
    with pytest.raises(ValueError, match=r"bits=0: a positive number, as in plan_qat"):
        plan_qat(params=1e9, tokens=1e11, bits=0)


def test_the_law_term_by_term():
    n, fp, qat, b = 3e8, 2e10, 5e9, 3
    s_fp, s_qat = fp / (n * b / 8), qat / (n * b / 8)
    chinchilla = 1.6 + 400 / 2.5e10**0.3 + 300 / n**0.32
    floor, little = 1.2 * 2 ** (-0.9 * b), 40 * 2 ** (-0.6 * b) / (n**0.15 * s_qat**0.4)
    interaction = 8 * 2 ** (-0.5 * b) / (n**0.1 * s_fp**0.25 * s_qat**0.15)
    loss = LAW.loss(params=n, fp_tokens=fp, qat_tokens=qat, bits=b)
    assert loss == pytest.approx(chinchilla + floor + little + interaction, rel=1e-12)


def test_with_a_law_the_plan_is_its_minimum():
    plan = plan_qat(params=3e8, tokens=2e10, bits=2, law=LAW)

    def loss(share):
        return LAW.loss(params=3e8, fp_tokens=2e10 * (1 - share), qat_tokens=2e10 * share, bits=2)

    shares = np.linspace(0.001, 0.999, 999)
    assert plan.fraction == pytest.approx(shares[np.argmin([loss(s) for s in shares])], abs=2e-3)
    assert 0.1 < plan.fraction < 0.9
    assert plan.loss == pytest.approx(loss(plan.fraction), rel=1e-12)
    assert plan.loss <= min(loss(s) for s in shares) + 1e-12
    more = plan_qat(params=3e8, tokens=2e11, bits=2, law=LAW)
    assert more.loss < plan.loss


def test_sizes_of_one_memory_budget():
    rows = compare_sizes(deployed_bytes=1e8, tokens=2e10, bits=[1, 2, 4, 8], law=LAW)
    assert {bits: params * bits / 8 for params, bits, _ in rows} == dict.fromkeys((1, 2, 4, 8), 1e8)
    losses = [plan.loss for _, _, plan in rows]
    assert losses == sorted(losses)
    for params, bits, plan in rows:
        assert plan == plan_qat(params=params, tokens=2e10, bits=bits, law=LAW)


def test_the_share_is_recovered_despite_an_outlier():
    rng = np.random.default_rng(0)
    s = np.geomspace(5, 1e4, 20)
    shares = np.array([optimal_share(x, a=5.5) for x in s]) + rng.normal(0, 0.003, 20)
    shares[7] = 0.95
    assert fit_share(list(zip(s, shares, strict=True))) == pytest.approx(5.5, rel=0.01)
    with pytest.raises(ValueError, match=r"above 1.*fit_share"):
        fit_share([(0.5, 0.1)])


def test_the_law_is_recovered_from_synthetic_runs():
    """Runs of the made-up law with 0.05 percent noise, one in 20 ruined: predictions hold where no run was."""
    rng = np.random.default_rng(1)

    def runs(count):
        for _ in range(count):
            n, tokens, share = math.exp(rng.uniform(17, 21.5)), math.exp(rng.uniform(21, 25)), rng.uniform(0.03, 0.9)
            bits = int(rng.choice([1, 2, 3, 4, 6]))
            fp, qat = tokens * (1 - share), tokens * share
            yield Run(n, fp, qat, bits, LAW.loss(params=n, fp_tokens=fp, qat_tokens=qat, bits=bits))

    seen = [run._replace(loss=run.loss * math.exp(rng.normal(0, 5e-4))) for run in runs(240)]
    for i in range(0, len(seen), 20):
        seen[i] = seen[i]._replace(loss=seen[i].loss * 1.5)
    law = fit_loss_law(seen, starts=1)
    errors = []
    for run in runs(100):
        predicted = law.loss(**{name: value for name, value in run._asdict().items() if name != "loss"})
        errors.append(abs(math.log(predicted / run.loss)))
    assert max(errors) < 0.01  # least squares (delta=10) gave 0.074 and a mean of 0.022
    assert np.mean(errors) < 0.001
    assert law.alpha == pytest.approx(LAW.alpha, rel=0.02)
    with pytest.raises(ValueError, match="cannot fit 16 coefficients"):
        fit_loss_law(seen[:16])


def test_many_starts_find_the_lowest_valley():
    def residuals(raw):  # zero at 3 only; valleys near every odd number
        return (raw - 3).abs() * 0.1 + 1 - torch.cos(math.pi * (raw - 3))

    stuck = fit(residuals, lambda random: np.array([9.1]), starts=1, delta=1.0, seed=0)
    assert abs(float(stuck[0]) - 3) > 1

    def draw(random):
        return np.array([random.uniform(-10, 10)])

    assert float(fit(residuals, draw, starts=20, delta=1.0, seed=0)[0]) == pytest.approx(3, abs=1e-3)
    with pytest.raises(ValueError, match="no start gave finite"):
        fit(lambda raw: raw / 0, draw, starts=2, delta=1.0, seed=0)


def test_tokens_per_byte():
    assert tokens_per_byte(8, 100, 2) == 50
