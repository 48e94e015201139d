"""Random Kronecker rotations."""

import pytest
import torch

from qlightning.solvers.incoherence import Incoherence, KroneckerRotation, balanced_factor, random_orthogonal, rotation


@pytest.mark.parametrize("size", [1, 2, 7, 12, 36, 60])
def test_it_is_orthogonal_and_inverts(size):
    rotation, x = KroneckerRotation(size, seed=3), torch.randn(4, size, dtype=torch.float64)
    matrix = rotation(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(rotation(x), x @ matrix)
    torch.testing.assert_close(rotation.inverse(rotation(x)), x)
    torch.testing.assert_close(rotation.inverse(x), x @ matrix.T)


def test_it_is_a_function_of_its_seed():
    x = torch.randn(3, 12)
    assert torch.equal(KroneckerRotation(12, seed=1)(x), KroneckerRotation(12, seed=1)(x))
    assert not torch.equal(KroneckerRotation(12, seed=1)(x), KroneckerRotation(12, seed=2)(x))


def test_the_factors_are_as_equal_as_can_be():
    assert [balanced_factor(n) for n in (4096, 11008, 13, 24)] == [64, 86, 1, 4]


def test_it_spreads_a_spike():
    spike = torch.zeros(64)
    spike[5] = 8.0
    assert float(KroneckerRotation(64, seed=0)(spike).abs().max()) < 4.0


def test_orthogonal_matrices_are_drawn_uniformly():
    """Haar: every entry has mean 0 and variance 1 / n."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([random_orthogonal(3, generator) for _ in range(4000)])
    torch.testing.assert_close(drawn.mean(0), torch.zeros(3, 3, dtype=torch.float64), atol=0.04, rtol=0)
    torch.testing.assert_close(drawn.var(0), torch.full((3, 3), 1 / 3, dtype=torch.float64), atol=0.03, rtol=0)


def test_a_basis_for_quantizers():
    basis, weight = Incoherence(seed=2), torch.randn(6, 10, dtype=torch.float64)
    u, v = basis(torch.eye(6, 10, dtype=torch.float64)), basis.columns(torch.eye(10, dtype=torch.float64))
    torch.testing.assert_close(basis.inverse(basis(weight)), weight)
    torch.testing.assert_close(basis(weight).square().sum(), weight.square().sum())
    rows = rotation(6, 2)(torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(basis(weight), rows.T @ weight @ v)
    torch.testing.assert_close(u, rows.T @ torch.eye(6, 10, dtype=torch.float64) @ v)
    assert basis == Incoherence(seed=2) != Incoherence()
    assert repr(basis) == "Incoherence(seed=2)"
