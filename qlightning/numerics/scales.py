"""Scales: where the step size comes from, as a function of the values at hand.

A scale sees the blocks of a granularity (elements that share a scale in the last dimension) and returns a `Grid`: the
realised step sizes, in float32 but already rounded to the dtype in which they ship. Scales with memory (observers,
learned steps) are in `learned.py`, scales of scales (MX, NVFP4) in `microscaling.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qlightning.numerics.formats import Format
from qlightning.numerics.part import Part
from qlightning.numerics.statistics import HERE, Pool, absmax, divide, extremes, mean_magnitude, total_magnitude

Ship = Callable[[Tensor], Tensor]
"""Rounds float32 scales to the dtype they ship in and returns them as float32, straight-through in backward."""


class Grid(NamedTuple):
    """Where the representable values lie: `value = (q - zero_point) * step`.

    Attributes:
        scale: float32 (..., 1), exactly representable in the dtype it ships in.
        zero_point: float32 (..., 1) in code units, integers unless the scale's zero is real; None: a symmetric grid.
        tensor_scale: float32 of one element that divides `scale` (two-level scales), or None.
        inner: float32 (..., 1), the step in which values are rounded where it is not `step`: then the scale moves the
            values of codes and never the codes.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    tensor_scale: Tensor | None = None
    inner: Tensor | None = None

    @property
    def step(self) -> Tensor:
        """Distance between neighbouring codes, float32 (..., 1)."""
        return self.scale if self.tensor_scale is None else self.scale / self.tensor_scale

    @property
    def divisor(self) -> Tensor:
        """The step that rounding sees, with infinity in place of zero, so that such a block becomes zeros, not NaN."""
        if self.inner is not None:
            return self.inner
        step = self.step
        return step if self.tensor_scale is None else step.masked_fill(step == 0, float("inf"))


class Scale(Part, nn.Module, ABC):
    """A rule that gives each block its step size."""

    static: bool = False
    """True when the scale is state (observed or learned) and not a function of the values at hand."""

    learned: bool = False
    """True when gradient descent moves it."""

    real_zero: bool = False
    """Whether its zero points are real numbers, which ship in float32, and not codes."""

    offset: bool | None = False
    """Whether it also gives a zero point, as asymmetric formats need; None when it does as the format requires."""

    order_free: bool = False
    """Whether it takes all it knows of values from `statistics.py` by its pools: the same bits wherever they are."""

    of_tensor: bool = False
    """Whether a block's scale also depends on the other blocks of its tensor."""

    pool: Pool = HERE
    """Where the values of a block are."""

    tensor_pool: Pool = HERE
    """Where the blocks of the tensor are, for a scale `of_tensor`."""

    ships_as: torch.dtype | None = None
    """The dtype the rule fixes for its scales, or None when the quantizer chooses."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    __repr__ = Part.__repr__
    __eq__ = Part.__eq__
    __hash__ = nn.Module.__hash__

    @abstractmethod
    def forward(self, blocks: Tensor, format: Format, ship: Ship) -> Grid:
        """The grid for blocks of shape (..., elements)."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Scale":
        """Moves with the model but keeps its dtypes when the model is cast: float32 where it decides."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class Measured(Scale, ABC):
    """A scale that is a statistic of the values at hand. No gradient flows through it."""

    @abstractmethod
    def measure(self, blocks: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
        """Step size, float32 (..., 1), and for rules with an offset the smallest covered value, float32 (..., 1)."""

    def forward(self, blocks: Tensor, format: Format, ship: Ship) -> Grid:
        with torch.no_grad():
            scale, lower = self.measure(blocks.detach(), format)
            scale = ship(scale)
            return Grid(
                scale, None if lower is None else zero_point(lower, scale, format).clamp_(format.low, format.high)
            )


def zero_point(lower: Tensor, scale: Tensor, format: Format) -> Tensor:
    """The code (float32 integer) that means zero when the lowest code means `lower`. Straight-through in backward."""
    exact = format.low - lower / scale
    return exact + (torch.round(exact) - exact).detach() if exact.requires_grad else torch.round(exact)


def _full_range(blocks: Tensor, format: Format, pool: Pool) -> tuple[Tensor, Tensor | None]:
    """Step and lower end of the range in which nothing saturates: absmax, or min-max for an asymmetric format."""
    if format.symmetric:
        return divide(absmax(blocks, pool), format.bound), None
    lowest, highest = extremes(blocks, pool)
    lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
    return divide(highest - lowest, format.high - format.low), lowest


class AbsMax(Measured):
    """absmax / bound: the largest magnitude of the block is covered."""

    order_free = True

    def measure(self, blocks: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
        return _full_range(blocks, format, self.pool)


class MinMax(Measured):
    """(max - min) / (high - low) with a zero point; the range always contains zero, so that zero is exact."""

    offset = True
    order_free = True

    def measure(self, blocks: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
        return _full_range(blocks, format, self.pool)


class AbsMean(Measured):
    """multiplier * mean |x|, the scale of BitNet b1.58 (arXiv 2402.17764) and XNOR-Net (arXiv 1603.05279).

    Args:
        multiplier: Step size in units of the mean magnitude.
    """

    order_free = True

    def __init__(self, *, multiplier: float = 1.0) -> None:
        super().__init__()
        self.multiplier = _positive("AbsMean", "multiplier", multiplier)

    def measure(self, blocks: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
        return mean_magnitude(blocks, self.pool) * self.multiplier, None


class AbsMedian(Measured):
    """multiplier * median |x| (the lower median for an even count).

    Args:
        multiplier: Step size in units of the median magnitude.
    """

    order_free = True

    def __init__(self, *, multiplier: float = 1.0) -> None:
        super().__init__()
        self.multiplier = _positive("AbsMedian", "multiplier", multiplier)

    def measure(self, blocks: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
        middle = (self.pool.count(blocks.shape[-1]) + 1) // 2
        return self.pool.smallest(blocks.float().abs(), middle) * self.multiplier, None


class LSQStep(Measured):
    """2 * mean |x| / sqrt(Qp): the initial step of LSQ (Esser et al. 2020, section 2.1)."""

    order_free = True

    def measure(self, blocks: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
        return mean_magnitude(blocks, self.pool) * (2 * max(format.high, 1.0) ** -0.5), None


class Percentile(Measured):
    """The p-th percentile of |x| / bound; what lies above saturates.

    The percentile is an element of the block: the ceil(p / 100 * n)-th smallest magnitude of n.

    Args:
        percent: In (0, 100].
    """

    order_free = True

    def __init__(self, percent: float = 99.9) -> None:
        super().__init__()
        if not 0 < percent <= 100:
            raise ValueError(f"Percentile({percent}): a percentage in (0, 100], for example Percentile(99.9)")
        self.percent = percent

    def measure(self, blocks: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
        count = self.pool.count(blocks.shape[-1])
        rank = min(count, max(1, -int(-count * self.percent // 100)))
        return divide(self.pool.smallest(blocks.float().abs(), rank), format.bound), None


class MSE(Measured):
    """The clipping of min-max or absmax that makes the squared rounding error smallest, by search.

    Ratios 1, 1 - d, ... down to `floor` of the full range are tried per block, with the format's own nearest rounding.

    Args:
        steps: Number of ratios tried.
        floor: Smallest ratio.
        power: Exponent of the error (2: mean squared error; 2.4 is usual with GPTQ).
    """

    offset = None
    order_free = True

    def __init__(self, *, steps: int = 40, floor: float = 0.2, power: float = 2.0) -> None:
        super().__init__()
        if steps < 2 or not 0 < floor < 1 or power <= 0:
            raise ValueError(
                f"MSE(steps={steps}, floor={floor}, power={power}): at least 2 steps, a floor in (0, 1) and a positive "
                "power, for example MSE(steps=40, floor=0.2)"
            )
        self.steps, self.floor, self.power = steps, floor, power

    def measure(self, blocks: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
        scale, lower = _full_range(blocks, format, self.pool)
        x = blocks.float()
        best = torch.full_like(scale, float("inf"))
        best_scale, best_lower = scale.clone(), None if lower is None else lower.clone()
        for i in range(self.steps):
            ratio = 1 - i * (1 - self.floor) / (self.steps - 1)
            trial = (scale * ratio).clamp_(min=torch.finfo(torch.float32).smallest_normal)
            zero = None if lower is None else zero_point(lower * ratio, trial, format).clamp_(format.low, format.high)
            v = x / trial if zero is None else x / trial + zero
            q = format.snap(v, torch.round)
            error = ((q if zero is None else q - zero) * trial - x).abs_().pow_(self.power)
            error = total_magnitude(error, self.pool)
            better = error < best
            best = torch.where(better, error, best)
            best_scale = torch.where(better, trial, best_scale)
            if best_lower is not None and lower is not None:
                best_lower = torch.where(better, lower * ratio, best_lower)
        return best_scale, best_lower


def _positive(owner: str, name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{owner}({name}={value}): must be positive, for example {owner}({name}=1.0)")
    return float(value)
