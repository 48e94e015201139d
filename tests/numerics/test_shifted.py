"""Shifts around a quantizer, against autograd of the composition."""

import copy

import pytest
import torch
from torch import nn

from qlightning import Scheme, convert
from qlightning.layers.swap import convert_like
from qlightning.numerics import parse
from qlightning.numerics.shifted import Shifted
from qlightning.numerics.spec import describe, rebuild


def moved(spec: str, features: int = 8) -> Shifted:
    shifted = Shifted(spec)
    shifted.build((-1, features))
    shifted.initialize(torch.randn(64, features))
    with torch.no_grad():
        shifted.before.normal_()
        shifted.after.normal_()
    return shifted


@pytest.mark.parametrize("spec", ["int4-tensor-lsq", "int4-token", "uint4-lsq"])
def test_values_and_gradients_are_those_of_the_composition(spec: str) -> None:
    shifted, x, grad = moved(spec), torch.randn(3, 5, 8, requires_grad=True), torch.randn(3, 5, 8)
    learned = list(shifted.learned())
    naive = shifted.quantizer(x + shifted.before) + shifted.after
    assert torch.equal(shifted(x), naive)
    found = torch.autograd.grad(shifted(x), [x, *learned], grad)
    for one, other in zip(found, torch.autograd.grad(naive, [x, *learned], grad), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_it_starts_as_the_quantizer_itself_and_settles_on_what_it_sees() -> None:
    x, shifted, plain = torch.randn(6, 8), Shifted("int4-tensor-lsq"), parse("int4-tensor-lsq")
    assert not shifted.ready
    for each in (shifted, plain):
        each.build((-1, 8))
        each.observe(x)
        each.scale.settle()
    assert shifted.ready
    assert torch.equal(shifted(x), plain(x))


def test_a_ramp_and_bypass_act_on_the_whole() -> None:
    shifted, x = moved("int4-tensor-lsq"), torch.randn(3, 8)
    full = shifted(x)
    shifted.set_strength(0.5)
    assert torch.allclose(shifted(x), (x + full) / 2, atol=1e-6)
    shifted.enabled = False
    assert torch.equal(shifted(x), x)
    shifted(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in shifted.learned())


def test_a_layer_trains_it_and_its_checkpoint_describes_it() -> None:
    net, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(6, 8)
    convert(net, Scheme("int4", input=Shifted("int4-tensor-lsq")))
    shifted = net[0].input_quantizer
    shifted.initialize(x)
    with torch.no_grad():
        shifted.after.fill_(0.5)
    y = net(x)
    expected = (shifted.quantizer(x) + 0.5) @ net[0].weight_quantizer(net[0].weight).t() + net[0].bias
    assert torch.allclose(y, expected, atol=1e-5)
    y.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in shifted.learned())
    other = nn.Sequential(nn.Linear(8, 4))
    convert_like(other, net.state_dict())
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), y)
    assert torch.equal(copy.deepcopy(net)(x), y)
    assert rebuild(describe(shifted)) == shifted
    assert shifted.stored_bytes((6, 8), torch.float32) == shifted.quantizer.stored_bytes((6, 8), torch.float32) + 64


def test_it_keeps_dtypes() -> None:
    shifted = moved("int4-tensor-lsq")
    assert shifted(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16
    x = torch.randn(2, 8).bfloat16().requires_grad_()
    shifted.bfloat16()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_it_must_know_the_number_of_features() -> None:
    with pytest.raises(ValueError, match="does not know their number"):
        Shifted("int4-tensor-lsq").build((-1, -1))
