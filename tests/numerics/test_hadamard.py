"""The transform against scipy's matrix, and the properties that define it."""

import pytest
import torch
from scipy.linalg import hadamard as matrix_of
from torch import Tensor

from qlightning.numerics.hadamard import hadamard, largest_block


def matrix(size: int) -> Tensor:
    return torch.tensor(matrix_of(size), dtype=torch.float32) * size**-0.5


@pytest.mark.parametrize("size", [1, 2, 8, 256])
def test_it_is_scipys_matrix(size: int) -> None:
    x = torch.randn(3, 2, size)
    assert torch.allclose(hadamard(x), x @ matrix(size), atol=1e-5)


def test_what_is_no_power_of_two_is_done_in_blocks() -> None:
    x = torch.randn(5, 48)
    expected = torch.cat([part @ matrix(16) for part in x.split(16, dim=-1)], dim=-1)
    assert torch.allclose(hadamard(x), expected, atol=1e-6)
    by_four = torch.cat([part @ matrix(4) for part in x.split(4, dim=-1)], dim=-1)
    assert torch.allclose(hadamard(x, 4), by_four, atol=1e-6)
    assert largest_block(48) == 16


def test_it_is_its_own_inverse_and_keeps_lengths() -> None:
    x = torch.randn(7, 512)
    assert torch.allclose(hadamard(hadamard(x)), x, atol=1e-6)
    assert torch.allclose(hadamard(x).norm(dim=-1), x.norm(dim=-1))


def test_one_hot_becomes_constant_in_magnitude() -> None:
    x = torch.zeros(1, 64)
    x[0, 37] = 1.0
    assert torch.equal(hadamard(x).abs(), torch.full((1, 64), 64**-0.5))


def test_a_rotated_weight_undoes_it() -> None:
    x, w = torch.randn(6, 128), torch.randn(10, 128)
    assert torch.allclose(hadamard(x) @ hadamard(w).t(), x @ w.t(), atol=1e-4)


def test_its_gradient_is_itself_and_saves_nothing() -> None:
    x, grad = torch.randn(4, 48, requires_grad=True), torch.randn(4, 48)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = hadamard(x, 8)
    (found,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(found, hadamard(grad, 8))
    blocks = torch.block_diag(*[matrix(8)] * 6)
    (expected,) = torch.autograd.grad(x @ blocks, x, grad)
    assert torch.allclose(found, expected, atol=1e-6)
    assert kept == []


def test_additions_are_in_float32_whatever_the_dtype() -> None:
    x = torch.randn(8, 1024).bfloat16()
    assert hadamard(x).dtype == torch.bfloat16
    assert torch.equal(hadamard(x), hadamard(x.float()).bfloat16())


def test_it_leaves_its_input_alone_and_takes_an_empty_one() -> None:
    x = torch.randn(2, 16)
    before = x.clone()
    hadamard(x)
    assert torch.equal(x, before)
    assert hadamard(torch.empty(0, 16)).shape == (0, 16)


def test_a_block_that_does_not_fit_names_one_that_does() -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard(torch.randn(2, 24), 12)
    with pytest.raises(ValueError, match="8 is the largest"):
        hadamard(torch.randn(2, 24), 16)


# torch.compile builds an instance of the autograd function it traces and is warned by torch for it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_compiles_without_graph_breaks() -> None:
    x = torch.randn(4, 32, requires_grad=True)
    compiled = torch.compile(lambda t: hadamard(t).square().sum(), backend="aot_eager", fullgraph=True)
    loss = compiled(x)
    (found,) = torch.autograd.grad(loss, x)
    assert torch.allclose(found, 2 * x, atol=1e-5)
