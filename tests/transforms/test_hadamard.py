"""Rotations as a layer's transform and as a quantizer's basis."""

import pytest
import torch
from torch import nn

from qlightning import Scheme, convert
from qlightning.layers.swap import convert_like
from qlightning.numerics import AbsMax, Int, PerChannel, PerGroup, PerToken, Quantizer, parse
from qlightning.numerics.hadamard import hadamard
from qlightning.numerics.spec import describe, rebuild
from qlightning.transforms.hadamard import Hadamard, RandomHadamard

SIGNS = [1, -1, -1, 1, 1, 1, -1, 1, -1, 1, 1, -1, -1, -1, 1, 1]


def test_a_layer_rotates_its_input_before_its_quantizer() -> None:
    net, x = nn.Sequential(nn.Linear(64, 8)), torch.randn(3, 64)
    convert(net, Scheme("ternary", input="int4-token", transform=Hadamard()))
    q_x, q_w = parse("int4-token")(hadamard(x)), parse("ternary")(net[0].weight)
    assert torch.allclose(net[0](x), q_x @ q_w.t() + net[0].bias, atol=1e-5)


def test_the_gradient_to_the_input_is_rotated_back() -> None:
    net, x = nn.Sequential(nn.Linear(64, 8)), torch.randn(3, 64, requires_grad=True)
    convert(net, Scheme("ternary", input="int4-token", transform=Hadamard()))
    grad = torch.randn(3, 8)
    (found,) = torch.autograd.grad(net(x), x, grad)
    assert torch.allclose(found, hadamard(grad @ parse("ternary")(net[0].weight)), atol=1e-5)


def test_the_checkpoint_names_the_block_and_rebuilds_the_transform() -> None:
    net = nn.Sequential(nn.Linear(48, 8))
    convert(net, Scheme("ternary", transform=Hadamard()))
    assert net.state_dict()["0.transform.size"].tolist() == [16]
    other = nn.Sequential(nn.Linear(48, 8))
    convert_like(other, net.state_dict())
    other.load_state_dict(net.state_dict())
    x = torch.randn(2, 48)
    assert torch.equal(other(x), net(x))


def test_conversion_refuses_blocks_that_do_not_tile_the_features() -> None:
    with pytest.raises(ValueError, match="16 is the largest"):
        convert(nn.Sequential(nn.Linear(48, 8)), Scheme("ternary", transform=Hadamard(32)))
    with pytest.raises(ValueError, match="power of two"):
        Hadamard(12)


@pytest.mark.parametrize("basis", [Hadamard(), Hadamard(8), RandomHadamard(16, signs=SIGNS), RandomHadamard(seed=3)])
def test_as_a_basis_it_keeps_the_function(basis: Hadamard | RandomHadamard) -> None:
    x, w = torch.randn(6, 64), torch.randn(10, 64)
    assert torch.allclose(basis.inverse(basis(x)), x, atol=1e-6)
    assert torch.allclose(basis(x) @ basis(w).t(), x @ w.t(), atol=1e-4)
    q_x = Quantizer(Int(8), PerToken(), transform=basis)
    q_w = Quantizer(Int(8), PerChannel(), transform=basis)
    assert torch.allclose(q_x(x) @ q_w(w).t(), x @ w.t(), atol=0.6)
    assert not torch.equal(q_x(x), Quantizer(Int(8), PerToken())(x))


def test_a_quantizer_in_a_basis_rounds_there_and_back() -> None:
    x = torch.randn(4, 32)
    quantizer = Quantizer(Int(4), PerGroup(16), transform=RandomHadamard(signs=SIGNS))
    signs = torch.tensor(SIGNS).float().repeat(2)
    rotated = parse("int4-g16")(hadamard(x * signs, 16))
    assert torch.equal(quantizer(x), hadamard(rotated, 16) * signs)
    assert torch.equal(quantizer.dequantize(quantizer.quantize(x), x.dtype), quantizer(x))


def test_one_outlier_costs_less_in_the_basis() -> None:
    x = torch.randn(8, 256)
    x[:, 5] = 60.0
    plain, rotated = (Quantizer(Int(4), PerToken(), scale=AbsMax(), transform=t) for t in (None, Hadamard()))
    assert (rotated(x) - x).square().mean() < 0.3 * (plain(x) - x).square().mean()


def test_signs_are_given_or_follow_the_seed() -> None:
    x = torch.randn(2, 32)
    assert torch.equal(RandomHadamard(seed=1)(x), RandomHadamard(seed=1)(x))
    assert not torch.equal(RandomHadamard(seed=1)(x), RandomHadamard(seed=2)(x))
    assert torch.allclose(RandomHadamard(16, signs=[1] * 16)(x), hadamard(x, 16))
    with pytest.raises(ValueError, match="16 numbers"):
        RandomHadamard(16, signs=[1, -1])
    with pytest.raises(ValueError, match="do not tile 24"):
        RandomHadamard(16)(torch.randn(2, 24))


@pytest.mark.parametrize("basis", [Hadamard(), Hadamard(8), RandomHadamard(16, signs=SIGNS), RandomHadamard(seed=3)])
def test_it_is_described_by_its_arguments(basis: Hadamard | RandomHadamard) -> None:
    assert rebuild(describe(basis)) == basis
    quantizer = Quantizer(Int(4), PerToken(), transform=basis)
    assert rebuild(describe(quantizer)) == quantizer
