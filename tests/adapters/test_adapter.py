"""What a layer gets of an adapter, and the moments at which one is told of its layer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlightning import Scheme, convert
from qlightning.adapters import Adapter, Inside, LowRank
from qlightning.layers.swap import convert_like


class Told(Adapter):
    """An adapter that does nothing and writes down what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def under(self, wrapper: nn.Module | None, *, peft: bool) -> Adapter | None:
        return self

    def build(self, matrix: Tensor, features: int) -> None:
        self.register_buffer("value", torch.zeros(1))

    def on_attached(self, layer: nn.Module) -> None:
        self.told.append("attached")

    def on_kept(self, layer: nn.Module) -> None:
        self.told.append("kept")

    def on_loading(self, layer: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
        self.told.append(f"loading {prefix}")

    def kept_bits(self):
        return None

    def inside(self) -> Inside | None:
        return LowRank([])


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8))


def test_it_is_told_when_a_conversion_is_complete_and_before_values_are_loaded() -> None:
    one, other = net(), net()
    convert(one, {"0": Scheme("int8", adapter=Told())})
    assert one[0].adapter.told == ["attached", "kept"]
    convert_like(other, one.state_dict())
    assert other[0].adapter.told == ["attached"]
    other.load_state_dict(one.state_dict())
    assert other[0].adapter.told == ["attached", "loading 0."]


def test_it_sits_inside_a_weights_quantizer() -> None:
    with pytest.raises(ValueError, match="give a weight spec too"):
        Scheme(input="int8-token", adapter=Told())
    with pytest.raises(TypeError):
        Adapter()
