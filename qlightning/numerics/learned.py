"""Scales with memory: followed by a moving average, or learned by gradient descent.

Their state exists from conversion on, because parameters must exist before optimizers are built and weights sharded. It
means nothing until it is settled: `observe` gathers statistics, `settle` makes them the scale in use, and only then is
the scale `ready`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlightning.numerics.formats import Format
from qlightning.numerics.granularity import Shape
from qlightning.numerics.scales import AbsMax, Grid, Measured, MinMax, Scale, Ship, zero_point


class Static(Scale, ABC):
    """A scale that is state.

    Attributes:
        ready: Whether the state has been settled; a scale that is not ready must not quantize anything.
        follows: Whether it goes on observing while it quantizes in training, until it is frozen.
        moving: Whether it does so now.
        source: The rule whose results are gathered; chosen by the format when not given (absmax or min-max).
    """

    static = True
    ready: bool = False
    follows: bool = False
    moving: bool = False
    count: Tensor

    def __init__(self, source: Measured | None) -> None:
        super().__init__()
        self.source = source

    def build(self, shape: Shape, format: Format) -> None:
        """Create the state for scales of that shape. Raises ValueError if `source` does not suit the format."""
        self.offset = not format.symmetric
        if self.source is not None and self.source.offset not in (None, self.offset):
            wanted = "MinMax() or MSE()" if self.offset else "AbsMax() or another rule without a zero point"
            raise ValueError(f"{self!r} does not suit {format!r}: its source must be {wanted}")
        self.rule: Measured = self.source or (MinMax() if self.offset else AbsMax())
        self.register_buffer("count", torch.zeros(1, dtype=torch.float32))
        self.create(shape)

    def measure(self, blocks: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
        return self.rule.measure(blocks.detach(), format)

    def follow_rule_of(self, other: "Static", format: Format) -> None:
        """Measure from now on as `other` does for a format, and forget what was observed."""
        self.source = other.source
        self.rule = other.source or (MinMax() if self.offset else AbsMax())
        self.reset()

    def switches(self) -> dict[str, Any]:
        """What beside parameters and buffers a checkpoint must know of it, as plain data."""
        return {}

    def set_switches(self, switches: Mapping[str, Any]) -> None:
        """Restore `switches()`."""

    @abstractmethod
    def create(self, shape: Shape) -> None:
        """Register parameters and buffers for scales of that shape."""

    @abstractmethod
    def observe(self, blocks: Tensor, format: Format) -> None:
        """Take in one batch of values."""

    @abstractmethod
    def settle(self) -> None:
        """Make what was observed the scale in use. Raises ValueError if nothing was observed."""

    @abstractmethod
    def merge(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Pool what several processes observed; `reduce` sums a tensor over them."""

    @abstractmethod
    def reset(self) -> None:
        """Forget what was observed (not the scale in use)."""

    def check_observed(self) -> None:
        if not bool(self.count):
            raise ValueError(
                f"nothing was observed for {self!r}: let it see values first, observe(x), or check that the "
                "calibration data is not empty"
            )


class EMA(Static):
    """An exponential moving average of a measured scale: follows the data in training, constant in eval.

    Args:
        decay: Weight of the past, in (0, 1).
        source: What is averaged; absmax (or min-max for asymmetric formats) when not given.
    """

    value: Tensor
    lower: Tensor | None
    follows = True
    moving: bool = True

    def __init__(self, *, decay: float = 0.99, source: Measured | None = None) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"EMA(decay={decay}): in (0, 1), for example EMA(decay=0.99)")
        super().__init__(source)
        self.decay = decay

    def create(self, shape: Shape) -> None:
        self.register_buffer("value", torch.ones(shape, dtype=torch.float32))
        self.register_buffer("lower", torch.zeros(shape, dtype=torch.float32) if self.offset else None)

    def observe(self, blocks: Tensor, format: Format) -> None:
        scale, lower = self.measure(blocks, format)
        with torch.no_grad():
            first = self.count == 0
            self.value.copy_(torch.where(first, scale, self.value.lerp(scale, 1 - self.decay)))
            if self.lower is not None and lower is not None:
                self.lower.copy_(torch.where(first, lower, self.lower.lerp(lower, 1 - self.decay)))
            self.count += 1

    def settle(self) -> None:
        self.check_observed()
        self.ready = True

    def merge(self, reduce: Callable[[Tensor], Tensor]) -> None:
        total = reduce(self.count.clone())
        for tensor in (self.value, self.lower):
            if tensor is not None:
                tensor.copy_(reduce(tensor * self.count) / total.clamp(min=1))
        self.count.copy_(total)

    def reset(self) -> None:
        self.count.zero_()

    def forward(self, blocks: Tensor, format: Format, ship: Ship) -> Grid:
        with torch.no_grad():
            scale = ship(self.value)
            return Grid(scale, None if self.lower is None else _clamped_zero(self.lower, scale, format))


class Learned(Static):
    """A step size (and offset) learned by gradient descent: LSQ (arXiv 1902.08153), LSQ+ (arXiv 2004.09576).

    The step in use is |value|, so that an optimizer step across zero cannot make it negative. For an asymmetric format
    an offset is learned too.

    Args:
        source: The rule that gives the initial step; absmax (or min-max) when not given. LSQ's own is `LSQStep()`.
        zero: What the offset of an asymmetric format is: "integer", the smallest covered value, whose zero point is
            rounded to a code; "real", the value of code 0 as it is (LSQ+'s beta), which ships in float32.
        rounding: "same": values are rounded in units of the step that is learned. "frozen": in units of the step as it
            was settled (or last held), so that learning moves the values of codes and never the codes.

    Attributes:
        held: Whether a "frozen" rounding is in force; `release` and `hold` switch it.
    """

    learned = True
    held: bool = True
    value: nn.Parameter
    lower: nn.Parameter | None
    total_value: Tensor
    total_lower: Tensor | None
    inner: Tensor | None

    def __init__(
        self,
        source: Measured | None = None,
        *,
        zero: Literal["integer", "real"] = "integer",
        rounding: Literal["same", "frozen"] = "same",
    ) -> None:
        super().__init__(source)
        if zero not in ("integer", "real") or rounding not in ("same", "frozen"):
            raise ValueError(
                f"Learned(zero={zero!r}, rounding={rounding!r}): write zero='integer' or 'real', rounding='same' or "
                "'frozen'"
            )
        self.zero, self.rounding = zero, rounding
        self.real_zero = zero == "real"

    def create(self, shape: Shape) -> None:
        self.value = nn.Parameter(torch.ones(shape, dtype=torch.float32))
        self.register_parameter("lower", nn.Parameter(torch.zeros(shape, dtype=torch.float32)) if self.offset else None)
        self.register_buffer("total_value", torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("total_lower", torch.zeros(shape, dtype=torch.float32) if self.offset else None)
        frozen = self.rounding == "frozen"
        self.register_buffer("inner", torch.ones(shape, dtype=torch.float32) if frozen else None)

    def observe(self, blocks: Tensor, format: Format) -> None:
        scale, lower = self.measure(blocks, format)
        with torch.no_grad():
            self.total_value += scale
            if self.total_lower is not None and lower is not None:
                self.total_lower += lower - format.low * scale if self.real_zero else lower
            self.count += 1

    def settle(self) -> None:
        self.check_observed()
        with torch.no_grad():
            self.value.copy_(self.total_value / self.count)
            if self.lower is not None and self.total_lower is not None:
                self.lower.copy_(self.total_lower / self.count)
        self.ready = True
        if self.inner is not None:
            self.hold()

    def hold(self) -> None:
        """Round in units of the present step from now on, whatever the step becomes."""
        if self.inner is None:
            raise ValueError("this scale rounds in the step it learns; write Learned(rounding='frozen') to hold it")
        with torch.no_grad():
            self.inner.copy_(self.value.abs())
        self.held = True

    def release(self) -> None:
        """Round in units of the step that is learned, as with rounding="same"."""
        self.held = False

    def switches(self) -> dict[str, Any]:
        return {"held": self.held} if self.inner is not None else {}

    def set_switches(self, switches: Mapping[str, Any]) -> None:
        self.held = switches.get("held", True)

    def merge(self, reduce: Callable[[Tensor], Tensor]) -> None:
        for tensor in (self.count, self.total_value, self.total_lower):
            if tensor is not None:
                tensor.copy_(reduce(tensor.clone()))

    def reset(self) -> None:
        self.count.zero_()
        self.total_value.zero_()
        if self.total_lower is not None:
            self.total_lower.zero_()

    def forward(self, blocks: Tensor, format: Format, ship: Ship) -> Grid:
        scale = ship(self.value.abs())
        inner = ship(self.inner) if self.inner is not None and self.held else None
        if self.lower is None:
            return Grid(scale, inner=inner)
        if self.real_zero:
            return Grid(scale, -self.lower / (scale if inner is None else inner), inner=inner)
        return Grid(scale, _clamped_zero(self.lower, scale if inner is None else inner, format), inner=inner)


def _clamped_zero(lower: Tensor, scale: Tensor, format: Format) -> Tensor:
    """The zero point inside the code range, with the gradient of the unclamped one."""
    exact = zero_point(lower, scale, format)
    return exact + (exact.clamp(format.low, format.high) - exact).detach()
