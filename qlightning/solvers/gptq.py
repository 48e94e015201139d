"""GPTQ: accurate post-training quantization for generative pre-trained transformers."""

from typing import Literal

import torch
from torch import Tensor

from qlightning.numerics.quantizer import Quantizer
from qlightning.solvers.lattice import Lattice
from qlightning.solvers.moments import Moments
from qlightning.solvers.solver import SiteSolution, SiteSolver, StreamName
from qlightning.solvers.sweep import damp, sweep


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
        if not damping >= 0 or block < 1 or order not in ("natural", "activation"):
            raise ValueError(
                f"GPTQ(damping={damping}, order={order!r}, block={block}): write for example GPTQ(damping=0.01, "
                "order='activation', block=128)"
            )
        self.damping, self.order, self.block = damping, order, block

    def solve(
        self, weight: Tensor, moments: Moments, *, quantizer: Quantizer, generator: torch.Generator
    ) -> SiteSolution:
        lattice = Lattice(quantizer, weight)
        values, used = torch.empty(weight.shape, dtype=torch.float32, device=weight.device), 0.0
        hessians = lattice.hessians(moments.hessian)
        size = len(weight) // len(hessians)
        for i, hessian in enumerate(hessians):
            rows = slice(i * size, (i + 1) * size)
            damped, damping = damp(hessian, self.damping)
            order = hessian.diagonal().argsort(descending=True, stable=True) if self.order == "activation" else None
            values[rows] = sweep(
                lattice.weight[rows],
                damped,
                lambda v, columns, rows=rows: lattice.nearest(v, rows, columns),  # type: ignore[misc]
                order=order,
                block=self.block,
            )
            used = max(used, damping)
        return SiteSolution(lattice.values(values), used)
