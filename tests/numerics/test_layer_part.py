"""Parts beside quantizers: attached by conversion, described by checkpoints, taken away by restore."""

import pytest
import torch
from torch import Tensor, nn

from qlightning import Scheme, convert, restore
from qlightning.layers.swap import convert_like
from qlightning.numerics import Int, PerChannel, PerGroup, Quantizer
from qlightning.numerics.transform import Basis, Transform


class Reversed(Basis):
    """The features from last to first, negated."""

    def __init__(self, *, sign: float = -1.0) -> None:
        super().__init__()
        self.sign = sign

    def build(self, matrix: Tensor, features: int) -> None:
        self.register_buffer("uses", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1) * self.sign

    def inverse(self, x: Tensor) -> Tensor:
        return x.flip(-1) * self.sign


class OnlyForOdd(Transform):
    """A transform that does not fit."""

    def build(self, matrix: Tensor, features: int) -> None:
        raise ValueError(f"{features} features are not odd")

    def forward(self, x: Tensor) -> Tensor:
        return x


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def test_a_layer_transforms_its_input_before_its_quantizer() -> None:
    net, x = model(), torch.randn(3, 16)
    plain = nn.functional.linear(x.flip(-1) * -1, net[0].weight, net[0].bias)
    convert(net, {"0": Scheme("int8", transform=Reversed()), "2": None})
    net[0].weight_quantizer.enabled = False
    assert torch.equal(net[0](x), plain)


def test_the_checkpoint_describes_parts_and_loads_without_naming_them() -> None:
    net, x = model(), torch.randn(3, 16)
    convert(net, {"*": Scheme("int8", transform=Reversed(sign=2.0))})
    other = model()
    convert_like(other, net.state_dict())
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
    third = model()
    convert(third, {"*": Scheme("int8", transform=Reversed())})
    with pytest.raises(ValueError, match="the checkpoint holds transform"):
        third.load_state_dict(net.state_dict())


def test_a_float_checkpoint_loads_into_a_model_with_parts() -> None:
    net, plain = model(), model()
    convert(net, {"*": Scheme("int8", transform=Reversed())})
    assert not net.load_state_dict(plain.state_dict()).missing_keys


def test_converting_twice_needs_the_same_parts() -> None:
    net = model()
    convert(net, {"*": Scheme("int8", transform=Reversed())})
    convert(net, {"*": Scheme("int8", transform=Reversed())})
    with pytest.raises(ValueError, match="converted already"):
        convert(net, {"*": Scheme("int8", transform=Reversed(sign=2.0))})


def test_restore_takes_parts_away() -> None:
    net, x = model(), torch.randn(3, 16)
    plain = net(x)
    convert(net, {"*": Scheme("int8", transform=Reversed())})
    restore(net)
    assert torch.equal(net(x), plain)
    assert list(net.state_dict()) == list(model().state_dict())


def test_a_part_that_does_not_fit_leaves_the_model_plain() -> None:
    net = model()
    with pytest.raises(ValueError, match="not odd"):
        convert(net, {"*": Scheme("int8", transform=OnlyForOdd())})
    assert type(net[0]) is nn.Linear


def test_a_layer_without_a_place_for_it_says_so() -> None:
    net = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16))
    with pytest.raises(ValueError, match="no place for a transform"):
        convert(net, {"0": Scheme("int8", transform=Reversed()), "1": "int8"})


def test_a_quantizer_works_in_a_basis() -> None:
    """Against the formula: transform, quantize in groups, transform back; gradients pass as through the identity."""
    x = torch.randn(4, 16).requires_grad_()
    quantizer, plain = Quantizer(Int(4), PerGroup(4), transform=Reversed()), Quantizer(Int(4), PerGroup(4))
    assert torch.equal(quantizer(x), -plain(-x.flip(-1)).flip(-1))
    stored = quantizer.quantize(x)
    assert torch.equal(quantizer.dequantize(stored, x.dtype), quantizer(x))
    (grad,) = torch.autograd.grad(quantizer(x).sum(), x)
    assert torch.equal(grad, torch.ones_like(x))


def test_a_basis_is_part_of_what_a_quantizer_deploys() -> None:
    assert not Quantizer(Int(4), PerChannel()).deploys_like(Quantizer(Int(4), PerChannel(), transform=Reversed()))
    assert Quantizer(Int(4), transform=Reversed()) == Quantizer(Int(4), transform=Reversed())
