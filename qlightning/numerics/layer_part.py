"""What a layer has beside its quantizers: a transform of its input, an adapter of its weight."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlightning.numerics.part import Part
from qlightning.numerics.tensor_quantizer import TensorQuantizer, read_extra_state


class LayerPart(Part, nn.Module, ABC):
    """A module that conversion adds to a layer, under the name of its place.

    Attributes:
        place: "transform", "adapter", "backward" or "product", the attribute of the layer and the prefix of its state.
        beside: The placement that a layer has if the part is meant for such layers.
    """

    place: ClassVar[str]
    beside: ClassVar[str] = "weight"

    def __init__(self) -> None:
        nn.Module.__init__(self)

    __repr__ = Part.__repr__
    __eq__ = Part.__eq__
    __hash__ = nn.Module.__hash__

    @abstractmethod
    def build(self, matrix: Tensor, features: int) -> None:
        """Create parameters and buffers, once.

        Args:
            matrix: The layer's weight as (output channels, fan-in), detached; it may be on the meta device.
            features: Size of the input's last dimension, -1 when unknown.

        Raises:
            ValueError: It does not fit such a layer.
        """

    def trains_like(self, other: "LayerPart") -> bool:
        """Whether both were asked for in the same words (see `TensorQuantizer.trains_like`)."""
        mine, others = self.arguments(), other.arguments()
        return (
            type(self) is type(other) and mine.keys() == others.keys() and all(_alike(mine[k], others[k]) for k in mine)
        )

    def shown(self) -> Mapping[str, str]:
        """What the coverage table says of it, by what it stands at."""
        return {self.place: repr(self)}

    def on_attached(self, layer: nn.Module) -> None:
        """Called once it is in its place."""

    def on_detached(self, layer: nn.Module) -> None:
        """Called before it is taken away: the layer must compute the same without it where that can be."""

    def get_extra_state(self) -> Tensor:
        """What it is, as JSON bytes: a checkpoint describes itself."""
        from qlightning.numerics.spec import describe

        return torch.frombuffer(bytearray(json.dumps({"part": describe(self)}).encode()), dtype=torch.uint8).clone()

    def set_extra_state(self, state: Tensor) -> None:
        from qlightning.numerics.spec import describe, rebuild

        loaded = read_extra_state(state)["part"]
        if not self.trains_like(rebuild(loaded)):
            raise ValueError(f"the checkpoint holds {self.place} {loaded!r} where the model has {describe(self)!r}")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint that knows nothing of this part (a float model's) leaves it as it is."""
        if not any(key.startswith(prefix) for key in state_dict):
            for name, value in self.state_dict().items():
                state_dict[prefix + name] = value
        super()._load_from_state_dict(state_dict, prefix, *args)


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, TensorQuantizer) and isinstance(other, TensorQuantizer):
        return one.trains_like(other)
    return bool(one == other)
