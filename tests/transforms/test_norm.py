"""The norms inside a layer, against torch's own modules."""

import pytest
import torch
from torch import nn

from qlightning import Scheme, convert, restore
from qlightning.numerics import parse
from qlightning.transforms.norm import LayerNorm, RMSNorm


@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_they_are_torchs_without_parameters(eps: float) -> None:
    x = torch.randn(3, 5, 16) + 2
    assert torch.allclose(LayerNorm(eps)(x), nn.LayerNorm(16, eps=eps, elementwise_affine=False)(x))
    assert torch.allclose(RMSNorm(eps)(x), nn.RMSNorm(16, eps=eps, elementwise_affine=False)(x))


@pytest.mark.parametrize("norm", [LayerNorm(), RMSNorm()])
def test_a_layer_normalises_before_it_quantizes(norm: LayerNorm | RMSNorm) -> None:
    net, x = nn.Sequential(nn.Linear(16, 4)), 5 * torch.randn(3, 16) + 1
    plain = net[0].weight.detach().clone()
    convert(net, Scheme("ternary", input="int8-token", transform=norm))
    expected = parse("int8-token")(norm(x)) @ parse("ternary")(plain).t() + net[0].bias
    assert torch.allclose(net(x), expected, atol=1e-5)
    assert not list(net[0].transform.parameters())
    assert type(restore(net)[0]) is nn.Linear


def test_the_dtype_stays_under_autocast() -> None:
    x = torch.randn(2, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert LayerNorm()(x).dtype == RMSNorm()(x).dtype == torch.bfloat16


def test_eps_is_checked() -> None:
    with pytest.raises(ValueError, match="positive"):
        RMSNorm(0)
