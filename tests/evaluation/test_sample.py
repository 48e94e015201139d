"""Samples of tensors: as many as said, from everywhere."""

import pytest
import torch

from qlightning.evaluation.sample import evenly


@pytest.mark.parametrize("shape", [(64, 64), (100, 32), (7, 13), (4096,), (1, 50)])
@pytest.mark.parametrize("at_most", [1, 10, 48])
def test_few_enough_and_not_too_few(shape, at_most):
    x = torch.arange(torch.Size(shape).numel()).view(shape)
    taken = evenly(x, at_most)
    assert at_most / 3 <= len(taken) <= at_most
    assert len(set(taken.tolist())) == len(taken)
    assert torch.equal(taken, evenly(x, at_most))


def test_all_columns_are_seen():
    columns = torch.arange(64).expand(64, 64)
    assert len(set(evenly(columns, 128).tolist())) == 64


def test_a_small_tensor_is_taken_whole():
    x = torch.randn(3, 5)
    assert torch.equal(evenly(x, 15), x.reshape(-1))
