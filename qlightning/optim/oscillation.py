"""Code changes of one weight from step to step: flips, oscillation, distance from the thresholds between codes.

Overcoming Oscillations in Quantization-Aware Training (Nagel et al., ICML 2022, arXiv 2203.11086), from memory. A
weight oscillates in a step in which its code changes in the direction opposite to its last change:

    frequency <- momentum * [oscillates] + (1 - momentum) * frequency
"""

from typing import Any

import torch
from torch import Tensor

from qlightning.numerics.formats import Format
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.scales import Grid
from qlightning.numerics.tensor_quantizer import State
from qlightning.optim.weights import Weight


def coded(weight: Weight) -> Quantizer:
    """The quantizer of a weight, which gives every element one code.

    Raises:
        ValueError: It does not: it is composed of several.
    """
    if not isinstance(weight.quantizer, Quantizer):
        raise ValueError(
            f"{weight.name} has the quantizer {weight.quantizer!r}, which has no single code for an element: leave the "
            "callback out, or quantize with one code, for example QATCallback(weight='int4-channel')"
        )
    return weight.quantizer


def elementwise(weight: Weight) -> Quantizer:
    """As `coded`, where moreover the code of an element depends on that element of a weight that training moves.

    Raises:
        ValueError: It works in another basis, or on the sum of a frozen weight and an adapter.
    """
    quantizer = coded(weight)
    if quantizer.transform is not None or weight.layer.inside() is not None:
        why = "its adapter is quantized with it" if quantizer.transform is None else "it is quantized in another basis"
        raise ValueError(f"{weight.name} cannot be held element by element: {why}; leave freezing and annealing out")
    return quantizer


def positions(quantizer: Quantizer, matrix: Tensor, state: State) -> Tensor:
    """Where values lie on the format's own grid, before rounding: float32 of the matrix's shape."""
    grid = Grid(*state)
    seen = matrix if quantizer.transform is None else quantizer.transform(matrix.float())
    v = quantizer.granularity.view(seen).float() / grid.divisor
    if grid.zero_point is not None:
        v = v + grid.zero_point
    return quantizer.granularity.unview(v, matrix.shape)


def threshold_distance(v: Tensor, format: Format) -> Tensor:
    """Distance of positions to the nearest threshold between two codes, in units of the gap between these codes.

    >>> from qlightning.numerics import Int
    >>> threshold_distance(torch.tensor([0.0, 0.4, 0.6, -9.0]), Int(4))
    tensor([0.5000, 0.1000, 0.1000, 1.5000])
    """
    levels = torch.tensor(sorted(set(format.values())), dtype=torch.float32, device=v.device)
    thresholds, gaps = (levels[1:] + levels[:-1]) / 2, levels[1:] - levels[:-1]
    above = torch.bucketize(v, thresholds).clamp_(max=len(thresholds) - 1)
    below = (above - 1).clamp_(min=0)
    return torch.minimum(
        (v - thresholds[above]).abs() / gaps[above],
        (v - thresholds[below]).abs() / gaps[below],
    )


class Tracker:
    """What the codes of one weight did so far.

    Args:
        momentum: Weight of the present step in the averages, in (0, 1).

    Attributes:
        codes: The codes after the last step.
        frequency: The oscillation frequency of every element, float32 in [0, 1].
        mean: The moving average of the position of the code on the format's grid, float32.
        frozen: Which elements are held, bool.
        held: The codes at which they are held.
    """

    def __init__(self, *, momentum: float) -> None:
        self.momentum = momentum
        self._tensors: dict[str, Tensor] = {}
        self._steps = 0

    @property
    def codes(self) -> Tensor:
        return self._tensors["codes"]

    @property
    def frequency(self) -> Tensor:
        return self._tensors["frequency"]

    @property
    def mean(self) -> Tensor:
        return self._tensors["mean"]

    @property
    def frozen(self) -> Tensor:
        return self._tensors["frozen"]

    @property
    def held(self) -> Tensor:
        return self._tensors["held"]

    @property
    def begun(self) -> bool:
        return bool(self._tensors)

    def update(self, codes: Tensor, format: Format) -> None:
        """Take in the codes after a step. The first are only remembered."""
        t = self._tensors
        q = format.decode(codes)
        if not t:
            t["codes"], t["mean"] = codes.clone(), q
            t["direction"] = torch.zeros_like(codes, dtype=torch.int8)
            t["frequency"] = torch.zeros_like(q)
            t["frozen"], t["held"] = torch.zeros_like(codes, dtype=torch.bool), codes.clone()
            t["flips"] = torch.zeros((), dtype=torch.float64, device=codes.device)
            return
        direction = (q - format.decode(t["codes"])).sign().to(torch.int8)
        oscillates = direction * t["direction"] < 0
        t["frequency"].lerp_(oscillates.float(), self.momentum)
        t["mean"].lerp_(q, self.momentum)
        t["direction"] = torch.where(direction != 0, direction, t["direction"])
        t["flips"] += (direction != 0).float().mean()
        t["codes"] = codes.clone()
        self._steps += 1

    def freeze(self, above: float, format: Format) -> None:
        """Hold elements that oscillate more often than that, at the code nearest to their mean position."""
        new = (self.frequency > above) & ~self.frozen
        nearest = format.encode(format.snap(self.mean.clone(), torch.round))
        self._tensors["held"] = torch.where(new, nearest, self.held)
        self._tensors["frozen"] = self.frozen | new

    def take_flip_rate(self) -> float:
        """Share of the codes that change in a step, averaged over the steps since this was last asked."""
        rate = float(self._tensors["flips"]) / self._steps if self._steps else 0.0
        self._tensors["flips"].zero_()
        self._steps = 0
        return rate

    def state_dict(self) -> dict[str, Any]:
        return {**self._tensors, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any], *, device: torch.device) -> None:
        self._tensors = {name: value.to(device) for name, value in state.items() if name != "steps"}
        self._steps = state["steps"]
