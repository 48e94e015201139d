"""Weights in one byte each: the error is at most half of the last fractional bit."""

import pytest
import torch
from torch import nn

from qlightning import Scheme, convert
from qlightning.adapters import LoRA


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shared", ["channel", "g8", "tensor"])
def test_numbers_are_off_by_half_a_fraction_at_most(bits: int, shared: str) -> None:
    """LR-QAT: |phi - W / s0| <= 2^-(9 - b) inside the range."""
    net = nn.Sequential(nn.Linear(64, 32))
    weight = net[0].weight.detach().clone()
    convert(net, {"0": Scheme(f"int{bits}-{shared}-learned", adapter=LoRA(2, base="fixed"))})
    point = net[0].adapter.fixed_point
    step = point.granularity.unview(point.step.expand_as(point.granularity.view(weight)), weight.shape)
    v, phi = weight / step, net[0].weight.float() / 2 ** (8 - bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    inside = (v >= low) & (v <= high)
    assert inside.float().mean() > 0.7
    assert float((phi - v)[inside].abs().max()) <= 2.0 ** -(9 - bits) + 1e-6
    assert phi.min() >= low
    assert phi.max() <= high
    assert torch.equal(point.encode(point.decode(net[0].weight)), net[0].weight)


def test_times_step_is_its_own_adjoint() -> None:
    net = nn.Sequential(nn.Linear(64, 32))
    convert(net, {"0": Scheme("int4-g8-learned", adapter=LoRA(2, base="fixed"))})
    x, y, point = torch.randn(32, 64), torch.randn(32, 64), net[0].adapter.fixed_point
    assert torch.allclose((point.times_step(x) * y).sum(), (x * point.times_step(y)).sum(), atol=1e-5)
