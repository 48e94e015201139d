"""Our side of the comparison."""

import pytest
import torch
from torch import nn

from qlightning.benchmark.contestant import Ours, Plain, split
from qlightning.layers.convert import quantizers_of


def test_a_scheme_is_split_at_its_commas() -> None:
    assert split("int4-g32") == ("int4-g32", None, [])
    assert split("int4-g32, int8-token") == ("int4-g32", "int8-token", [])
    assert split("int8-channel,int8-token,fprop+dgrad")[2] == ["fprop", "dgrad"]
    with pytest.raises(ValueError, match="weights, inputs and products"):
        split("a,b,c,d")


def test_plain_is_plain_and_ours_is_quantized() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    assert Plain().prepare(model) is model
    assert not list(quantizers_of(model))
    model = Ours("int4-g32,int8-token").prepare(model)
    assert len(list(quantizers_of(model))) == 2
    x = torch.randn(2, 32)
    assert not torch.equal(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))
