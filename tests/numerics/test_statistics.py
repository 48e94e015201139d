"""Statistics that are the same bits in whatever order: against exact rational sums, and in pieces."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlightning.numerics import MSE, AbsMean, Int, LSQStep, parse
from qlightning.numerics.statistics import (
    HERE,
    Pool,
    absmax,
    extremes,
    largest,
    mean_magnitude,
)
from qlightning.numerics.statistics import (
    total_magnitude as total,
)


class Pieces(Pool):
    """One of several pieces, whose others answered before: what a reduction over processes gives."""

    def __init__(self, elements, maxima, totals):
        self.elements, self.maxima, self.totals = elements, maxima, totals

    def count(self, here):
        return self.elements

    def maximum(self, x):
        self.maxima.append(x)
        return torch.stack(self.maxima).amax(0)

    def total(self, x):
        self.totals.append(x)
        return torch.stack(self.totals).sum(0)

    def smallest(self, x, rank):
        raise NotImplementedError


@given(x=st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=70))
def test_exact_but_for_the_last_rounding(x):
    values = torch.tensor([x])
    exact, top = math.fsum(x), max(x)
    error = abs(total(values).item() - exact)
    bits = len(x).bit_length()
    assert error <= 2.0**-24 * exact + max(2.0 ** (2 * bits - 61) * top, len(x) * 2.0**-126)
    assert total(values.flip(-1)).item() == total(values).item()


def test_any_order_and_any_cut():
    """Where torch's own sums differ, these do not."""
    x = torch.randn(1, 40_000).exp() * torch.randn(1, 40_000).sign()
    shuffled = x[:, torch.randperm(x.shape[1])]
    assert x.abs().sum() != shuffled.abs().sum()
    expected = total(x)
    assert torch.equal(total(shuffled), expected)
    ends = torch.cat([-x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)], -1)
    for cuts in ([7], [1, 20_000], [13_333, 26_666, 40_000]):
        totals = []
        for piece in x.tensor_split(cuts, dim=1):
            found = total(piece, Pieces(x.shape[1], [ends], totals))
        assert torch.equal(found, expected)
    for rows in (2, 5, 8):  # and a block is worth the same wherever it stands
        assert torch.equal(total(x.view(8, -1))[:rows], total(x.view(8, -1)[:rows]))


def test_large_blocks_are_added_in_pieces():
    x = torch.randn(3, 2**17 + 1)
    pieces, whole = total(x), torch.cat([total(row[None]) for row in x])
    assert torch.equal(pieces, whole)
    exact = x.double().abs().sum()
    assert abs(total(x.view(1, -1)).item() - exact) <= 2.0**-24 * exact


def test_means_are_more_exact_than_torchs():
    x = torch.randn(64, 5000) * torch.logspace(-30, 30, 64)[:, None]
    exact = x.double().abs().mean(-1, keepdim=True)
    assert ((mean_magnitude(x).double() - exact).abs() <= 2.0**-23 * exact).all()
    assert torch.equal(mean_magnitude(torch.full((1, 640), 1.375)), torch.full((1, 1), 1.375))
    one = torch.cat([torch.ones(1, 2**20), torch.tensor([[2.0**20]])], 1)  # an outlier does not swallow the rest
    assert mean_magnitude(one).item() == pytest.approx(2**21 / (2**20 + 1), rel=1e-7)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(value):
    x = torch.ones(2, 6)
    x[1, 3] = value
    found = total(x)
    assert found[0].item() == 6
    assert not found[1].isfinite()
    assert found[1].isnan() == math.isnan(value)


def test_nothing():
    empty = torch.ones(1, 0)
    pool = Pieces(3, [torch.tensor([[-2.0, 2.0]])], [torch.tensor([[2**58]])])
    assert total(empty, pool).item() > 0
    assert torch.equal(absmax(empty, Pieces(3, [torch.tensor([[3.0, 2.0]])], [])), torch.tensor([[3.0]]))
    assert largest(torch.ones(0, 1)).item() == 0
    assert total(torch.zeros(2, 5)).tolist() == [[0.0], [0.0]]


def test_extremes_over_pieces():
    x = torch.randn(1, 9)
    found = extremes(x[:, 4:], Pieces(9, [torch.stack([-x[:, :4].min(), x[:, :4].max()])[None]], []))
    assert torch.equal(torch.cat(found), torch.cat(extremes(x, HERE)))


@pytest.mark.parametrize("scale", [AbsMean(), LSQStep(), MSE(steps=4)])
def test_a_scale_does_not_depend_on_its_neighbours(scale):
    x = torch.randn(33, 777)
    alone = torch.cat([scale.measure(row[None], Int(4))[0] for row in x])
    assert torch.equal(scale.measure(x, Int(4))[0], alone)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled():
    quantizer, x = parse("ternary"), torch.randn(8, 24)
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), quantizer(x))
