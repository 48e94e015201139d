"""LDLQ: the adaptive rounding of QuIP, with its greedy and stochastic variants."""

from typing import Literal

import torch
from torch import Tensor

from qlightning.numerics.quantizer import Quantizer
from qlightning.solvers.moments import Moments
from qlightning.solvers.solver import SiteSolution, SiteSolver, StreamName
from qlightning.solvers.sweep import check_options, round_by_sweep


class LDLQ(SiteSolver):
    """Chee et al., NeurIPS 2023, arXiv 2307.13304, section 3: rounding with linear feedback by the LDL factors of H.

    With nearest rounding and columns as they come this is GPTQ, number for number. `greedy` passes of coordinate
    descent after it, on columns by falling diagonal, are the paper's LDLQ-RG.

    Args:
        greedy: Passes of coordinate descent after the sweep.
        rounding: "nearest", or "stochastic": up with probability equal to the fraction.
        damping: Added to the diagonal, in units of its mean.
        order: Columns in their "natural" order, or those with the largest inputs first ("activation").
        block: Columns that are corrected together.
        stream: Whose activations the moments are of.
        refresh: How often they are taken; QuIP takes them once per block.
        commit: What the trained weight becomes: the solution's "values", or these plus sub-step "residual"s.
        batches: Number of batches of calibration data.
        seed: Of all random numbers.
    """

    def __init__(
        self,
        *,
        greedy: int = 0,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        damping: float = 0.01,
        order: Literal["natural", "activation"] = "natural",
        block: int = 128,
        stream: StreamName = "q",
        refresh: Literal["group", "block"] = "block",
        commit: Literal["values", "residual"] = "values",
        batches: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(stream=stream, refresh=refresh, commit=commit, batches=batches, seed=seed)
        check_options("LDLQ", damping=damping, order=order, block=block)
        if greedy < 0 or rounding not in ("nearest", "stochastic"):
            raise ValueError(
                f"LDLQ(greedy={greedy}, rounding={rounding!r}): write for example LDLQ(greedy=1, rounding='nearest'), "
                "or rounding='stochastic'"
            )
        self.greedy, self.rounding, self.damping, self.order, self.block = greedy, rounding, damping, order, block

    def solve(
        self, weight: Tensor, moments: Moments, *, quantizer: Quantizer, generator: torch.Generator
    ) -> SiteSolution:
        return round_by_sweep(
            weight,
            moments,
            quantizer,
            damping=self.damping,
            order=self.order,
            block=self.block,
            rounding=torch.round if self.rounding == "nearest" else lambda position: stochastic(position, generator),
            greedy=self.greedy,
        )


def stochastic(position: Tensor, generator: torch.Generator) -> Tensor:
    """Up with probability equal to the fraction; random numbers come from the CPU, so that all devices draw alike."""
    below = position.floor()
    chance = torch.rand(position.shape, generator=generator).to(position.device)
    return below + (position - below > chance)
