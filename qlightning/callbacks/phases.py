"""Phases: which quantizers act at which step of a run. Switches of values only; the structure never changes.

    step      0 ............ start - calibration ............... start ........... freeze ............
    weights   float          float                               quantized         quantized
    inputs    float          float, static scales observe        quantized         quantized, static scales fixed

When `start` is sooner than `calibration`, static input scales observe the first `calibration` steps and act after them.
A switch settles every static scale it switches on, the weights' from the weights as they are then, the inputs' from
what was just observed: range, scale and switch move together.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qlightning.layers.coverage import public_name
from qlightning.layers.layer import Twin
from qlightning.numerics.learned import Static
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.rounding import Stochastic


class Place(NamedTuple):
    """One quantizer where it sits."""

    name: str
    layer: Twin
    prefix: str
    quantizer: Quantizer

    @property
    def is_weight(self) -> bool:
        return self.prefix in self.layer.weights()

    @property
    def observes(self) -> bool:
        """Whether its scale is settled by what the layer sees in training."""
        return isinstance(self.quantizer.scale, Static) and not self.is_weight


def places(module: nn.Module) -> Iterator[Place]:
    """Every quantizer of a converted module with its layer."""
    for name, layer in module.named_modules():
        if isinstance(layer, Twin):
            for prefix, quantizer in layer.quantizers():
                yield Place(f"{public_name(name)}.{prefix}", layer, prefix, quantizer)


class Phases:
    """The phases of one run of a converted module.

    Args:
        module: The converted module.
        start: Optimizer step at which quantization begins.
        calibration: Steps during which static scales of activations observe.
        freeze: Optimizer step from which scales are fixed, or None.
        reduce: Sums a statistic over processes.
        processes: Their number.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        start: int,
        calibration: int,
        freeze: int | None,
        reduce: Callable[[Tensor], Tensor],
        processes: int = 1,
    ) -> None:
        self._places = list(places(module))
        self.start, self.calibration, self.freeze = start, calibration, freeze
        self._reduce, self._processes = reduce, processes
        self._applied: int | None = None

    def begin(self) -> None:
        """The state before the first step of a fresh run (a resumed run has it from its checkpoint)."""
        for place in self._places:
            quantizer = place.quantizer
            quantizer.enabled = self._from(place) <= 0
            quantizer.observing = False
            if isinstance(quantizer.scale, Static) and not quantizer.enabled:
                quantizer.scale.ready = False
                quantizer.scale.reset()

    def _from(self, place: Place) -> int:
        """The step from which a quantizer acts."""
        if self.start == 0 and place.quantizer.ready:
            return 0
        return max(self.start, self.calibration) if place.observes else self.start

    def waits_for(self) -> list[Place]:
        """What acts later than the rest, since it must observe first."""
        return [place for place in self._places if self._from(place) > self.start]

    def frozen(self, step: int) -> bool:
        """Whether scales are fixed at a step."""
        return self.freeze is not None and step >= self.freeze

    def apply(self, step: int) -> list[Quantizer]:
        """Bring every quantizer into the phase of an optimizer step; returns those that were switched on.

        Raises:
            ValueError: A static scale is to act but has observed nothing, or nothing finite.
        """
        if step == self._applied:
            return []
        self._applied = step
        switched, unobserved = [], []
        for place in self._places:
            quantizer = place.quantizer
            if not quantizer.enabled and step >= self._from(place):
                if not self._settle(place):
                    unobserved.append(place.name)
                    continue
                quantizer.enabled, quantizer.observing = True, False
                switched.append(quantizer)
            elif not quantizer.enabled and place.observes:
                quantizer.observing = step >= self._from(place) - self.calibration
            if isinstance(quantizer.scale, Static):
                quantizer.scale.moving = quantizer.enabled and not self.frozen(step) and quantizer.scale.follows
        if unobserved:
            raise ValueError(
                f"{', '.join(unobserved)}: no input was seen in the {self.calibration} calibration steps before step "
                f"{step}; calibrate longer, QATCallback(calibration={max(1, 4 * self.calibration)}), or leave them in "
                f"float, rules={{{unobserved[0].rsplit('.', 1)[0]!r}: None}}"
            )
        return switched

    def pool(self) -> None:
        """Let scales that follow the data follow the data of every process."""
        scales = [place.quantizer.scale for place in self._places if place.observes]
        moving = [t for scale in scales if isinstance(scale, Static) and scale.moving for t in scale.buffers()]
        if self._processes > 1 and moving:
            mean = self._reduce(torch.cat([t.flatten() for t in moving])) / self._processes
            for tensor, pooled in zip(moving, mean.split([t.numel() for t in moving]), strict=True):
                tensor.copy_(pooled.view_as(tensor))

    def _settle(self, place: Place) -> bool:
        scale = place.quantizer.scale
        if not isinstance(scale, Static):
            return True
        if place.is_weight:
            place.quantizer.initialize(place.layer.weights()[place.prefix].detach())
        else:
            scale.merge(self._reduce)
            if not bool(scale.count):
                return False
            scale.settle()
        if any(not bool(torch.isfinite(tensor).all()) for tensor in [*scale.parameters(), *scale.buffers()]):
            raise ValueError(
                f"{place.name}: its scale is not finite; its weight or input held NaN or infinity. If training "
                "diverged, take a smaller learning rate or clip gradients, Trainer(gradient_clip_val=1.0)"
            )
        return True


def advance_rounding(module: nn.Module) -> None:
    """Move every stochastic rounding to the random numbers of the next training batch."""
    for child in module.modules():
        if isinstance(child, Stochastic):
            child.advance()
