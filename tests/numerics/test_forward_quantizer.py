"""The narrow contract is all that a layer's forward pass asks for."""

import copy

import pytest
import torch
from torch import nn

from qlightning.layers.convert import convert
from qlightning.numerics.forward_quantizer import ForwardQuantizer
from qlightning.numerics.granularity import PerTensor
from qlightning.numerics.rounding import Nearest
from qlightning.numerics.scales import AbsMax


class Tenths(ForwardQuantizer):
    """Values to one decimal, and nothing else of a quantizer."""

    needs_input = recomputable = True

    def __init__(self) -> None:
        super().__init__()
        self.granularity, self.scale, self.rounding = PerTensor(), AbsMax(), Nearest()

    def prepare(self, x):
        return ()

    def values(self, x, state, key):
        return x.round(decimals=1)

    def bypass(self, x):
        return x


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(8, 4), torch.randn(3, 8)),
        (nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9)),
        (nn.Embedding(5, 4), torch.tensor([[0, 4], [2, 2]])),
    ],
    ids=["linear", "conv", "embedding"],
)
@torch.no_grad()
def test_it_is_all_that_a_layer_asks_for(layer, x):
    plain, module = nn.Sequential(copy.deepcopy(layer)), nn.Sequential(layer)
    convert(module, {"0": "int8"})
    module[0]._modules["weight_quantizer"] = Tenths()
    plain[0].weight.copy_(plain[0].weight.round(decimals=1))
    assert torch.equal(module(x), plain(x))
    tenths = module[0]._modules["weight_quantizer"]
    tenths.enabled = False
    assert not torch.equal(module(x), plain(x))
