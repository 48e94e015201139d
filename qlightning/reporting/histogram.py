"""Histograms of weights on the grid on which they are quantized."""

from typing import NamedTuple

import torch
from torch import Tensor

from qlightning.evaluation.sample import evenly
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.tensor_quantizer import State
from qlightning.optim.oscillation import positions
from qlightning.optim.weights import Weight

ELEMENTS, BINS, FEW = 1 << 18, 120, 33


class Histogram(NamedTuple):
    """How the elements of one weight are spread, and the grid under them.

    Attributes:
        edges: Of the bins, ascending.
        density: Share of the elements per unit, of every bin.
        beyond: Share of the elements outside the bins.
        levels: The representable values, ascending.
        on_level: Share of the elements that is rounded to each level; empty where there are more than 33.
        unit: What the horizontal axis counts.
        elements: How many elements it is of.
    """

    edges: list[float]
    density: list[float]
    beyond: float
    levels: list[float]
    on_level: list[float]
    unit: str
    elements: int


def histogram_of(weight: Weight, matrix: Tensor, state: State, quantized: Tensor) -> Histogram:
    """The histogram of at most 262,144 evenly spaced elements.

    Args:
        weight: The weight.
        matrix: What its quantizer sees.
        state: The grid it is quantized on.
        quantized: Its quantized values.
    """
    quantizer = weight.quantizer
    if isinstance(quantizer, Quantizer):
        v = evenly(positions(quantizer, matrix, state), ELEMENTS)
        q = quantizer.format.decode(evenly(quantizer.codes(matrix, state, quantizer.rounding.key()), ELEMENTS))
        levels, unit = sorted(set(quantizer.format.values())), "step sizes"
    else:
        v, q = evenly(matrix, ELEMENTS).float(), evenly(quantized, ELEMENTS).float()
        levels, unit = q.unique().tolist(), "weight"
    return _histogram(v.cpu(), q.cpu(), levels, unit)


def _histogram(v: Tensor, q: Tensor, levels: list[float], unit: str) -> Histogram:
    finite = v[torch.isfinite(v)]
    ranked = finite.sort().values
    outer = len(ranked) // 1000
    low, high = min(float(ranked[outer]), levels[0]), max(float(ranked[-1 - outer]), levels[-1])
    pad = 0.03 * (high - low) or 1.0
    edges = torch.linspace(low - pad, high + pad, BINS + 1, dtype=torch.float64)
    counts, _ = torch.histogram(finite.double(), edges)
    inside = float(counts.sum()) / len(v)
    density = counts / len(v) / edges.diff()
    on_level: list[float] = []
    if len(levels) <= FEW:
        grid = torch.tensor(levels)
        on_level = [float((q == level).float().mean()) for level in grid]
    return Histogram(edges.tolist(), density.tolist(), max(0.0, 1 - inside), levels, on_level, unit, len(v))
