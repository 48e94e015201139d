"""A clipping range learned through sigmoids, as OmniQuant's learnable weight clipping and ApiQ have it."""

import torch
from torch import Tensor, nn

from qlightning.numerics.formats import Format
from qlightning.numerics.scales import Grid, Scale, Ship, zero_point
from qlightning.numerics.statistics import extremes


class SigmoidClip(Scale):
    """sigmoid(gamma) and sigmoid(beta) times the largest and smallest value of every block of one weight.

    For a symmetric format there is one factor, of the largest magnitude. Lives while a solver trains it; what it found
    is then written into the quantizer's own scale.

    Args:
        start: Initial logit; 4 means a range of 0.982.
    """

    learned = True
    offset = None

    def __init__(self, *, start: float = 4.0) -> None:
        super().__init__()
        self.start = start

    def fit(self, blocks: Tensor, format: Format) -> "SigmoidClip":
        """Create its parameters for the blocks (..., elements) of a weight."""
        lowest, highest = extremes(blocks.detach())
        if format.symmetric:
            highest, lowest = torch.maximum(highest.abs(), lowest.abs()), torch.zeros_like(lowest)
        self.register_buffer("highest", highest.clamp(min=0))
        self.register_buffer("lowest", lowest.clamp(max=0))
        self.gamma = nn.Parameter(torch.full_like(highest, self.start))
        self.beta = None if format.symmetric else nn.Parameter(torch.full_like(lowest, self.start))
        return self

    def forward(self, blocks: Tensor, format: Format, ship: Ship) -> Grid:
        high = torch.sigmoid(self.gamma) * self.get_buffer("highest")
        if self.beta is None:
            return Grid(ship((high / format.bound).clamp(1e-5, 1e4)))
        low = torch.sigmoid(self.beta) * self.get_buffer("lowest")
        scale = ship(((high - low) / (format.high - format.low)).clamp(1e-5, 1e4))
        zero = zero_point(low, scale, format)
        return Grid(scale, zero + (zero.clamp(format.low, format.high) - zero).detach())
