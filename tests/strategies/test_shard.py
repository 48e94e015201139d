"""Which modules are gathered one by one."""

import pytest
from torch import nn

from qlightning.strategies.shard import roots_of, shard, units_of


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 2)
        self.layers = nn.ModuleList([Block(), Block()])
        self.tail = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))


def test_the_outermost_lists():
    model = Model()
    assert units_of(model) == [*model.layers, model.tail[0], model.tail[2]]


def test_named_units():
    model = Model()
    assert units_of(model, ["layers.0", "type:Embedding"]) == [model.layers[0], model.embed]
    assert units_of(model, ["layers.*", "tail"]) == [*model.layers, model.tail]
    with pytest.raises(ValueError, match=r"'layer\.\*' matches no module"):
        units_of(model, ["layer.*"])


def test_roots_are_what_is_called():
    assert list(roots_of(model := Model())) == [model.embed, *model.layers, model.tail]


def test_a_parameter_in_two_units():
    model = Model()
    model.layers[1].inner[0].weight = model.layers[0].inner[1].weight
    with pytest.raises(ValueError, match=r"inner.1.weight and inner.0.weight are one parameter"):
        shard([model], units_of(model), None)
