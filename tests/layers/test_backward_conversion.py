"""Conversion with operands of backward: what the table says of them, and what is refused."""

import pytest
from torch import nn

from qlightning import Scheme, convert
from qlightning.layers.backward import Backward
from qlightning.numerics import Int, PerGroup, Quantizer
from qlightning.transforms import Hadamard

NVFP4 = {"grad_dgrad": "nvfp4", "grad_wgrad": "nvfp4", "input_wgrad": "nvfp4"}
SR = {"grad_dgrad": "nvfp4-sr", "grad_wgrad": "nvfp4-sr", "input_wgrad": "nvfp4"}


def layer(backward: Backward) -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 48))
    convert(model, Scheme("nvfp4-b16x16", input="nvfp4", backward=backward))
    return model[0]


def test_converting_twice_needs_the_same_slots_but_not_the_same_seeds() -> None:
    model = nn.Sequential(nn.Linear(32, 48))
    convert(model, {"*": Scheme("nvfp4", backward=Backward(**SR))})
    convert(model, {"*": Scheme("nvfp4", backward=Backward(**SR))})
    with pytest.raises(ValueError, match="converted already"):
        convert(model, {"*": Scheme("nvfp4", backward=Backward(**NVFP4))})


def test_the_coverage_table_names_the_operands_of_backward() -> None:
    model = nn.Sequential(nn.Linear(32, 48))
    table = convert(model, {"*": {"weight": "nvfp4", "backward": {**SR, "rotation": Hadamard(16)}}}).table()
    assert "grad_dgrad nvfp4-sr, weight_dgrad same, grad_wgrad nvfp4-sr, input_wgrad nvfp4, rotation Hadamard" in table


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"grad_dgrad": "same"}, "fprop has no gradient"),
        ({"grad_dgrad": "int4-channel"}, "its rows are tokens"),
        ({"grad_wgrad": "int4-token"}, "its rows are channels"),
        ({"input_wgrad": "int8-tensor-ema"}, "one of the values at hand"),
        ({"weight_dgrad": "int44"}, "did you mean"),
        ({"grad_wgrad": 4}, "write a spec"),
        ({"tokens": 0}, "at least 1"),
    ],
)
def test_a_slot_that_cannot_be_is_refused(arguments, why) -> None:
    with pytest.raises(ValueError, match=why):
        Backward(**arguments)


@pytest.mark.parametrize(
    ("backward", "why"),
    [
        (Backward(grad_dgrad="int4-g32"), "grad_dgrad int4-g32: group size 32 does not divide 48"),
        (Backward(grad_wgrad="int4-g32"), "grad_wgrad int4-g32: group size 32 does not divide 16"),
        (Backward(rotation=Hadamard(16), tokens=8), "blocks of 16 do not tile 8"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_at_conversion(backward, why) -> None:
    with pytest.raises(ValueError, match=why):
        layer(backward)
    assert layer(Backward(grad_wgrad=Quantizer(Int(4), PerGroup(32)), tokens=32)).backward.tokens == 32


def test_it_needs_a_weight_quantizer_to_begin_with() -> None:
    with pytest.raises(ValueError, match="give a weight spec too"):
        Scheme(input="int8-token", backward=Backward())


def test_convolutions_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16, 16))
    with pytest.raises(ValueError, match="0 \\(Conv2d\\): it has no place for a backward"):
        convert(model, Scheme("nvfp4", backward=Backward(**NVFP4)))
    assert type(model[0]) is nn.Conv2d
