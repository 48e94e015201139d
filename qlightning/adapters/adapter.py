"""Adapters: what is trained beside a frozen weight, inside its quantizer."""

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from qlightning.adapters.inside import Inside
from qlightning.numerics.layer_part import LayerPart


class Adapter(LayerPart, ABC):
    """Small trainable tensors beside a frozen weight, inside its quantizer.

    Attributes:
        acting: False takes it out of the layer's sum for a while.
    """

    acting: bool = True
    place = "adapter"

    @abstractmethod
    def under(self, wrapper: nn.Module | None, *, peft: bool) -> "Adapter | None":
        """What a layer gets of this adapter: itself, another one in its place, or None.

        Args:
            wrapper: PEFT's layer around it, if there is one.
            peft: Whether PEFT wraps any layer of the model.

        Raises:
            ValueError: It cannot be, and how PEFT's config should read.
        """

    def on_kept(self, layer: nn.Module) -> None:
        """Called when the conversion that attached it has succeeded as a whole, and weights have their values."""

    def on_loading(self, layer: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
        """Called before the layer's own tensors are loaded; what stands for them in the state dict may be replaced."""

    @abstractmethod
    def kept_bits(self) -> int | None:
        """Bits of the integers as which the frozen weight is kept, or None where it is kept as floats."""

    @abstractmethod
    def inside(self) -> Inside | None:
        """The rule by which the layer's weight quantizer sees the adapted weight; None while it does not act."""
