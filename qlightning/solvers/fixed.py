"""A scale that is measured once and kept: the grid on which a solver's solution stays."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlightning.capture import sites_of
from qlightning.layers.sharding import whole
from qlightning.numerics.formats import Format
from qlightning.numerics.granularity import Shape
from qlightning.numerics.learned import EMA, Learned, Static
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.scales import Grid, Measured, Scale, Ship, zero_point


class Fixed(Static):
    """What a dynamic scale measured when it was settled; from then on constant, in training too.

    A scale that follows the weight gives a quantized weight another grid than the one it was rounded on (its largest
    magnitude is another); a fixed one gives it back as it is.

    Args:
        source: The rule that measures.
    """

    value: Tensor
    lower: Tensor | None
    overall: Tensor | None

    def __init__(self, source: Scale) -> None:
        super().__init__(source)  # type: ignore[arg-type]
        self.ships_as = source.ships_as

    def create(self, shape: Shape) -> None:
        self.register_buffer("value", torch.ones(shape, dtype=torch.float32))
        self.register_buffer("lower", torch.zeros(shape, dtype=torch.float32) if self.offset else None)
        self.register_buffer("overall", None if isinstance(self.rule, Measured) else torch.ones(1, dtype=torch.float32))

    def observe(self, blocks: Tensor, format: Format) -> None:
        if isinstance(self.rule, Measured):
            scale, lower = self.measure(blocks, format)
            self.keep(scale, lower)
        else:
            grid = self.rule(blocks, format, lambda scale: scale)
            self.keep(grid.scale, None, grid.tensor_scale)
        self.count += 1

    def keep(self, scale: Tensor, lower: Tensor | None, overall: Tensor | None = None) -> None:
        """Take over a step size, the smallest covered value and the scale over all scales."""
        with torch.no_grad():
            self.value.copy_(scale)
            if self.lower is not None and lower is not None:
                self.lower.copy_(lower)
            if self.overall is not None:
                self.overall.fill_(1.0) if overall is None else self.overall.copy_(overall)

    def settle(self) -> None:
        self.check_observed()
        self.ready = True

    def merge(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Nothing to pool: it holds what one process measured of a weight, which all processes share."""

    def reset(self) -> None:
        self.count.zero_()

    def forward(self, blocks: Tensor, format: Format, ship: Ship) -> Grid:
        with torch.no_grad():
            scale = self.value.clone() if self.ships_as is not None else ship(self.value)
            if self.lower is None:
                return Grid(scale, None, self.overall)
            return Grid(scale, zero_point(self.lower, scale, format).clamp_(format.low, format.high))


def fix_scales(module: nn.Module) -> int:
    """Give every quantized weight whose scale follows it a fixed scale, settled on what its quantizer sees.

    Learned scales stay what they are. A moving average follows its weight too, and gets what it averages as the source.
    Returns how many were changed.

    A conversion that is to be calibrated does this right away, so that checkpoints of it fit.
    """
    changed = 0
    for site in sites_of(module):
        quantizer: Any = site.quantizer
        scale: Any = quantizer.scale
        if isinstance(quantizer, Quantizer) and (not scale.static or scale.follows):
            with whole(site.layer):
                weight = site.layer.effective(site.prefix)
                quantizer.scale = Fixed(scale.rule if scale.static else scale).train(quantizer.training)
                quantizer.build(tuple(weight.shape))
                quantizer.to(weight.device)
                quantizer.initialize(weight)
            changed += 1
    return changed


def settle_on(scale: Static, grid: Grid, format: Format) -> None:
    """Make a grid (without a scale over all scales) the one that a static scale realises from now on."""
    kept: Any = scale
    zero = grid.zero_point
    with torch.no_grad():
        kept.value.copy_(grid.scale)
        if zero is not None:
            low = 0.0 if getattr(scale, "real_zero", False) else format.low
            kept.lower.copy_((low - zero) * grid.scale)
    if isinstance(scale, Learned) and getattr(scale, "inner", None) is not None:
        scale.hold()
    assert isinstance(scale, Fixed | Learned | EMA)
    scale.ready = True
