"""GPTQ: accurate post-training quantization for generative pre-trained transformers."""

from typing import Literal

import torch
from torch import Tensor

from qlightning.numerics.quantizer import Quantizer
from qlightning.solvers.moments import Moments
from qlightning.solvers.solver import SiteSolution, SiteSolver, StreamName
from qlightning.solvers.sweep import check_options, round_by_sweep


class GPTQ(SiteSolver):
    """Frantar et al., ICLR 2023, arXiv 2210.17323: round column by column, the rest of the row makes up for the error.

    The grid is the quantizer's own, taken before the sweep ("static groups"): scales are not measured anew on weights
    that earlier columns have changed, so training and export use the very grid that was solved on. A column whose input
    is always zero is rounded to nearest, not set to zero as in the released code: training may still use it.

    Args:
        damping: Added to the diagonal, in units of its mean.
        order: Columns in their "natural" order, or those with the largest inputs first ("activation", the paper's
            act-order).
        block: Columns that are corrected together.
        stream: Whose activations the moments are of; the paper's are those of the model quantized so far.
        refresh: Whether moments are taken for every "group" of weights with one input or once per "block".
        commit: What the trained weight becomes: the solution's "values", or these plus sub-step "residual"s.
        batches: Number of batches of calibration data; the paper has 128 sequences of 2048 tokens.
        seed: Of the forward passes' random numbers.
    """

    def __init__(
        self,
        *,
        damping: float = 0.01,
        order: Literal["natural", "activation"] = "natural",
        block: int = 128,
        stream: StreamName = "q",
        refresh: Literal["group", "block"] = "group",
        commit: Literal["values", "residual"] = "values",
        batches: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(stream=stream, refresh=refresh, commit=commit, batches=batches, seed=seed)
        check_options("GPTQ", damping=damping, order=order, block=block)
        self.damping, self.order, self.block = damping, order, block

    def solve(
        self, weight: Tensor, moments: Moments, *, quantizer: Quantizer, generator: torch.Generator
    ) -> SiteSolution:
        return round_by_sweep(weight, moments, quantizer, damping=self.damping, order=self.order, block=self.block)
