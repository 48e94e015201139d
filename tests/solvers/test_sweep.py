"""The sweep against what its papers derive it from, and the paper's expected losses."""

from itertools import pairwise

import pytest
import torch

from qlightning.solvers.ldlq import stochastic
from qlightning.solvers.sweep import damp, descend, feedback, sweep


def hessian(d, seed=0, tokens=None):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 3 * d, d, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(-0.5, 0.5, d, dtype=torch.float64) + x[:, :1]
    return x.T @ x / len(x)


def integers(v, columns):
    return torch.round(v)


def loss(error, h):
    error = error.double()
    return float((error @ h * error).sum())


def by_conditional_least_squares(weight, h, nearest):
    """GPTQ from its definition: round a column, then solve for the columns that are left, all anew every time."""
    w, q = weight.double(), weight.double().clone()
    d = w.shape[1]
    for k in range(d):
        done = q[:, :k] - w[:, :k]
        # The free columns' best reply to the errors made: argmin over F of tr([done, F] H [done, F]^T)
        free = -torch.linalg.solve(h[k:, k:], h[k:, :k] @ done.T).T if k else torch.zeros_like(w)
        q[:, k] = nearest((w[:, k] + free[:, 0]).float()[:, None], torch.tensor([k]))[:, 0].double()
    return q.float()


@pytest.mark.parametrize("block", [1, 3, 128])
@pytest.mark.parametrize("clamped", [False, True])
def test_the_sweep_is_gptq_by_its_definition(clamped, block):
    def nearest(v, columns):
        return torch.round(v).clamp(-1, 1) if clamped else torch.round(v)

    for seed in range(5):
        h = hessian(9, seed)
        weight = torch.randn(7, 9, generator=torch.Generator().manual_seed(seed)) * 2
        assert torch.equal(sweep(weight, h, nearest, block=block), by_conditional_least_squares(weight, h, nearest))


def test_the_order_of_columns_is_the_callers():
    h, weight = hessian(8), torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) * 3
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    seen = []

    def nearest(v, columns):
        seen.append(int(columns))
        return torch.round(v)

    ours = sweep(weight, h, nearest, order=order)
    assert seen == order.tolist()
    permuted = by_conditional_least_squares(weight[:, order], h[order][:, order], integers)
    assert torch.equal(ours[:, order], permuted)
    assert not torch.equal(ours, sweep(weight, h, integers))


def test_feedback_factors_the_hessian():
    h = hessian(10)
    upper, diagonal = feedback(h)
    unit = upper + torch.eye(10, dtype=h.dtype)
    assert torch.equal(upper, upper.triu(1))
    torch.testing.assert_close(unit @ diagonal.diag() @ unit.T, h)


def test_expected_losses_of_the_paper():
    """QuIP, section 3: m tr(D) / 12 for nearest, m tr(D) / 6 for stochastic feedback, m tr(H) / 12 without feedback."""
    h, rows = hessian(6), 40_000
    _, diagonal = feedback(h)
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(rows, 6, generator=generator) * 16
    nearest = loss(sweep(weight, h, integers) - weight, h) / rows
    drawn = loss(sweep(weight, h, lambda v, c: stochastic(v, generator)) - weight, h) / rows
    plain = loss(torch.round(weight) - weight, h) / rows
    assert nearest == pytest.approx(float(diagonal.sum()) / 12, rel=0.03)
    assert drawn == pytest.approx(float(diagonal.sum()) / 6, rel=0.03)
    assert plain == pytest.approx(float(h.trace()) / 12, rel=0.03)


def test_without_correlation_it_is_rounding():
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)) * 3
    for h in (torch.eye(12), torch.linspace(1, 9, 12).diag()):
        assert torch.equal(sweep(weight, h.double(), integers), torch.round(weight))
        order = torch.arange(12)
        assert torch.equal(
            descend(weight, torch.round(weight), h.double(), integers, order=order, passes=3), torch.round(weight)
        )


def test_descent_never_raises_the_loss_and_ends_where_no_column_can_improve():
    h, weight = hessian(10, tokens=12), torch.randn(6, 10, generator=torch.Generator().manual_seed(2)) * 2
    order = h.diagonal().argsort(descending=True)
    values = [torch.round(weight)]
    for passes in range(1, 12):
        values.append(descend(weight, values[0], h, integers, order=order, passes=passes))
    losses = [loss(v - weight, h) for v in values]
    assert all(after <= before + 1e-9 for before, after in pairwise(losses))
    assert losses[-1] < 0.97 * losses[0]
    assert torch.equal(values[-1], values[-2])
    for i in range(10):
        for step in (-1, 1):
            moved = values[-1].clone()
            moved[:, i] += step
            per_row = ((moved - weight).double() @ h * (moved - weight).double()).sum(1)
            fixed = ((values[-1] - weight).double() @ h * (values[-1] - weight).double()).sum(1)
            assert (per_row >= fixed - 1e-4).all()


def test_damping():
    h = hessian(6)
    damped, used = damp(h, 0.1)
    assert used == 0.1
    torch.testing.assert_close(damped, h + 0.1 * h.diagonal().mean() * torch.eye(6, dtype=h.dtype))
    singular = torch.ones(4, 4)
    assert damp(singular, 0.0)[1] > 0
    assert torch.equal(damp(torch.zeros(4, 4), 0.01)[0], torch.eye(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="NaN"):
        damp(torch.full((2, 2), float("nan")), 0.01)
