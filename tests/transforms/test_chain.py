"""Transforms in a row."""

import pytest
import torch
from torch import nn

from qlightning import Scheme, convert
from qlightning.layers.swap import convert_like
from qlightning.numerics.hadamard import hadamard
from qlightning.numerics.spec import describe, rebuild
from qlightning.transforms.chain import Chain
from qlightning.transforms.hadamard import Hadamard
from qlightning.transforms.norm import RMSNorm


def test_they_act_in_order() -> None:
    x = 3 * torch.randn(2, 16) + 1
    assert torch.equal(Chain([RMSNorm(), Hadamard()])(x), hadamard(RMSNorm()(x)))


def test_it_is_described_and_restored_from_a_checkpoint() -> None:
    chain = Chain([RMSNorm(1e-3), Hadamard(8)])
    assert rebuild(describe(chain)) == chain
    net, other = (nn.Sequential(nn.Linear(24, 4)) for _ in range(2))
    convert(net, Scheme("ternary", transform=chain))
    convert(net, Scheme("ternary", transform=chain))  # a second time changes nothing
    convert_like(other, net.state_dict())
    other.load_state_dict(net.state_dict())
    x = torch.randn(2, 24)
    assert torch.equal(other(x), net(x))
    assert net[0].transform is not chain


def test_every_part_must_fit_the_layer() -> None:
    with pytest.raises(ValueError, match="8 is the largest"):
        convert(nn.Sequential(nn.Linear(24, 4)), Scheme("ternary", transform=Chain([RMSNorm(), Hadamard(16)])))
    with pytest.raises(ValueError, match="does nothing"):
        Chain([])
