"""Rounding to nearest: the solver that looks at no data, and the anchor that every other one is compared with."""

from typing import Literal

import torch
from torch import Tensor

from qlightning.numerics.quantizer import Quantizer
from qlightning.solvers.commit import rounded
from qlightning.solvers.moments import Moments
from qlightning.solvers.solver import SiteSolution, SiteSolver, StreamName


class RTN(SiteSolver):
    """Every weight to the nearest value of its grid.

    Args:
        stream: Activations that the reported losses are measured on.
        refresh: How often their moments are taken.
        commit: What the trained weight becomes: the rounded "values", or itself but for what saturates ("residual").
        batches: Number of batches of calibration data.
        seed: Of the forward passes' random numbers.
    """

    def __init__(
        self,
        *,
        stream: StreamName = "q",
        refresh: Literal["group", "block"] = "block",
        commit: Literal["values", "residual"] = "values",
        batches: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(stream=stream, refresh=refresh, commit=commit, batches=batches, seed=seed)

    def solve(
        self, weight: Tensor, moments: Moments, *, quantizer: Quantizer, generator: torch.Generator
    ) -> SiteSolution:
        return SiteSolution(rounded(quantizer, weight).float())
