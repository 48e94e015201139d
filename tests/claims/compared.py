"""Quantizer parts that no method has and claims compare with.

In a module of its own because parts are found again by the name of their module, and claims' files are not imported by
name.
"""

import torch
from torch import Tensor

from qlightning.methods.tdq import TimeMLP
from qlightning.numerics.rounding import Random, uniform


class UniformNoise(Random):
    """The noise of DiffQ: in training anything up to half a step."""

    def round(self, position: Tensor, key: Tensor | None) -> Tensor:
        return torch.round(position) if key is None else position + uniform(position, key) - 0.5


class Timeless(TimeMLP):
    """The same network, calibration and grid, asked for the first time step only."""

    def step_at(self, t_B: Tensor) -> Tensor:
        return super().step_at(torch.zeros_like(t_B))
