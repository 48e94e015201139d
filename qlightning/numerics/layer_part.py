"""What a layer has beside its quantizers: a transform of its input, an adapter of its weight."""

import json
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlightning.numerics.part import Part


class LayerPart(Part, nn.Module, ABC):
    """A module that conversion adds to a layer, under the name of its place.

    Attributes:
        place: "transform" or "adapter", the attribute of the layer and the prefix of its state.
    """

    place: ClassVar[str]

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

    def on_attached(self, layer: nn.Module) -> None:
        """Called once it is in its place."""

    def on_detached(self, layer: nn.Module) -> None:
        """Called before it is taken away: the layer must compute the same without it where that can be."""

    def get_extra_state(self) -> Tensor:
        """What it is, as JSON bytes: a checkpoint describes itself."""
        from qlightning.numerics.spec import describe

        return torch.frombuffer(bytearray(json.dumps({"part": describe(self)}).encode()), dtype=torch.uint8).clone()

    def set_extra_state(self, state: Tensor) -> None:
        from qlightning.numerics.spec import describe

        loaded = json.loads(bytes(state.cpu().tolist()))["part"]
        if loaded != json.loads(json.dumps(describe(self))):
            raise ValueError(f"the checkpoint holds {self.place} {loaded!r} where the model has {describe(self)!r}")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint that knows nothing of this part (a float model's) leaves it as it is."""
        if not any(key.startswith(prefix) for key in state_dict):
            for name, value in self.state_dict().items():
                state_dict[prefix + name] = value
        super()._load_from_state_dict(state_dict, prefix, *args)
