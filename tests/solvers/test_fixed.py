"""A scale that stays: the grid of a solution is found again."""

import pytest
import torch
from torch import nn

from qlightning.layers.convert import convert
from qlightning.layers.swap import convert_like
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.spec import describe, parse, rebuild
from qlightning.solvers.fixed import Fixed, fix_scales, settle_on

SPECS = ["int4", "int3-g8", "int4-g8-asym", "int4-mse", "ternary", "nvfp4", "mxfp4", "int4-absmean", "binary", "log4"]


def linear(spec):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 6))
    convert(model, spec)
    return model


@pytest.mark.parametrize("spec", SPECS)
def test_the_grid_is_that_of_the_dynamic_scale_and_stays(spec):
    model = linear(spec)
    quantizer, weight = model[0].quantizer("weight"), model[0].weight.detach().clone()
    values = quantizer(weight).detach()
    assert fix_scales(model) == 1
    assert isinstance(quantizer.scale, Fixed)
    assert fix_scales(model) == 0
    assert torch.equal(quantizer(weight), values)
    model[0].weight.data.copy_(values)
    model.train()
    assert torch.equal(quantizer(model[0].weight).detach(), values)
    assert torch.equal(quantizer.dequantize(quantizer.quantize(values), torch.float32), values)


@pytest.mark.parametrize("spec", ["int4-ema", "int4-g8-asym-ema"])
def test_a_moving_average_would_move(spec):
    model = linear(spec)
    quantizer, values = model[0].quantizer("weight"), model[0].quantizer("weight")(model[0].weight).detach()
    assert fix_scales(model) == 1
    model.train()
    for _ in range(3):
        assert torch.equal(quantizer(values), values)


def test_a_dynamic_scale_would_not_stay():
    quantizer = parse("int4")
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(quantizer(quantizer(weight)), quantizer(weight))


@pytest.mark.parametrize("spec", ["int4-lsq", "int4-asym-learned"])
def test_scales_that_are_state_are_left_alone(spec):
    model = linear(spec)
    assert fix_scales(model) == 0
    assert not isinstance(model[0].quantizer("weight").scale, Fixed)


@pytest.mark.parametrize("spec", ["int3-g8", "nvfp4", "int4-g8-asym"])
def test_checkpoints_describe_and_restore_it(spec):
    model = linear(spec)
    fix_scales(model)
    assert rebuild(describe(model[0].quantizer("weight"))) == model[0].quantizer("weight")
    again = nn.Sequential(nn.Linear(32, 6))
    convert_like(again, model.state_dict())
    again.load_state_dict(model.state_dict())
    x = torch.randn(3, 32)
    assert torch.equal(again(x), model(x))
    unconverted = linear(spec)
    with pytest.raises(ValueError, match="the checkpoint"):
        unconverted.load_state_dict(model.state_dict())


def test_it_moves_and_casts_with_the_model_but_stays_float32():
    model = linear("int4").to(torch.bfloat16)
    fix_scales(model)
    model.to(torch.float16)
    assert model[0].quantizer("weight").scale.value.dtype == torch.float32


@pytest.mark.parametrize("spec", ["int4-g8", "int4-g8-asym", "int4-lsq", "int4-g8-asym-learned"])
def test_settling_on_a_grid(spec):
    model, other = linear(spec), torch.randn(6, 32, generator=torch.Generator().manual_seed(5)) * 3 + 1
    fix_scales(model)
    quantizer = model[0].quantizer("weight")
    plain = Quantizer(quantizer.format, quantizer.granularity)
    grid = plain.grid(other)
    settle_on(quantizer.scale, grid, quantizer.format)
    assert torch.equal(quantizer(model[0].weight).detach(), plain.values(model[0].weight.detach(), grid, None))
