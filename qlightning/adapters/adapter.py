"""Adapters of our own, which a scheme gives to layers; those of PEFT's models are found in the model."""

from abc import ABC, abstractmethod

from qlightning.adapters.inside import Inside
from qlightning.numerics.layer_part import LayerPart


class Adapter(LayerPart, ABC):
    """Small trainable tensors beside a frozen weight, inside its quantizer."""

    place = "adapter"

    @abstractmethod
    def inside(self) -> Inside:
        """The rule by which the layer's weight quantizer sees the adapted weight."""
