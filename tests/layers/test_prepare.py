"""Which quantized weights are made beforehand; that compiled code reads them is in test_compile.py."""

import pytest
import torch
from torch import nn

from qlightning import Scheme, convert
from qlightning.adapters import LoRA
from qlightning.layers.kept_weight import KeptWeight
from qlightning.layers.prepare import prepare


def prepared(layer: nn.Module, scheme, *, acts: bool = True):
    torch.manual_seed(0)
    model = nn.Sequential(layer)
    convert(model, {f"type:{type(layer).__name__}": scheme})
    quantizer = model[0].quantizer("weight")
    quantizer.kept, quantizer.enabled = KeptWeight(), acts
    prepare(model[0])
    return model[0], quantizer.kept.prepared


@pytest.mark.parametrize("scheme", ["int4-g16", "int4-asym-learned", Scheme("int4-g16-lsq", adapter=LoRA(2)), "nvfp4"])
def test_it_is_the_quantizers_weight(scheme) -> None:
    layer, made = prepared(nn.Linear(32, 8), scheme)
    assert torch.equal(made.values, layer.weight_quantizer(layer.effective("weight")).detach())
    assert (made.dtype, made.codes) == (None, None)
    assert not made.values.requires_grad
    conv, made = prepared(nn.Conv2d(4, 8, 2), "int4-channel")
    assert made.values.shape == conv.weight.shape


def test_autocast_and_codes() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        layer, made = prepared(nn.Linear(32, 8), Scheme("int4-g16", input="int8-token", product="codes"))
    assert (made.values.dtype, made.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(made.codes.codes, layer.weight_quantizer.quantize(layer.weight).codes)
    assert made.codes.scale.shape == (8, 2)


@pytest.mark.parametrize(
    ("layer", "scheme", "acts"),
    [
        (nn.Linear(32, 8), "int4-g16", False),
        (nn.Linear(32, 8), "int4-g16-sr", True),
        (nn.Linear(32, 8), "int4-channel-ema", True),
        (nn.Embedding(8, 32), "int4-g16", True),
    ],
    ids=["off", "random", "moving", "no linear layer"],
)
def test_what_may_change_within_a_step_is_left_alone(layer, scheme, acts) -> None:
    assert prepared(layer, scheme, acts=acts)[1] is None
