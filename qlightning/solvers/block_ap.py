"""Block-AP: block-wise training of all parameters, the first phase of EfficientQAT."""

from collections.abc import Mapping
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlightning.capture import Site, device_of
from qlightning.numerics.formats import Format
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.scales import Grid, Scale, Ship
from qlightning.solvers.commit import commit, rounded
from qlightning.solvers.learning import LearningSolver, learn, standing_in
from qlightning.solvers.solver import BlockTask, SiteSolution


class BlockAP(LearningSolver):
    """Chen et al., ACL 2025, arXiv 2407.11062, section 3.2: block by block, train weights, steps and zero points.

    Each block learns to return on the quantized model's activations what the float block returns on the float model's.
    Its weights are then rounded in place: what follows trains on the grid (EfficientQAT's second phase: steps alone).
    Norms, biases, embeddings stay as they are.

    The paper computes in float16 with float32 masters; here in the model's own dtype with float32 masters. Batches are
    the caller's, the paper's are 2 sequences. Of a block the epoch is kept in which held-out batches came closest
    (perhaps none), where the released code keeps the last.

    Args:
        epochs: Passes over the data for each block; 0 rounds to nearest.
        weight_lr: AdamW's learning rate of weights; the paper's is 2e-5 for 2 bits and 1e-5 for 3 and 4.
        quant_lr: Of steps and zero points.
        floor: What both end at after a cosine, in units of where they begin.
        held_out: Share of the batches that nothing is learned from and that tell when to stop; at least one batch of
            two or more, and none at 0, where the last epoch is kept.
        patience: Epochs without a smaller held-out error after which a block is done.
        batches: Number of batches of calibration data; the paper has 4096 sequences of 2048 tokens.
        seed: Of the order of batches and of the forward passes' random numbers.
    """

    def __init__(
        self,
        *,
        epochs: int = 2,
        weight_lr: float = 1e-5,
        quant_lr: float = 1e-4,
        floor: float = 0.05,
        held_out: float = 1 / 64,
        patience: int = 2,
        batches: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(targets=("fp",), held_out=held_out, patience=patience, batches=batches, seed=seed)
        if epochs < 0 or min(weight_lr, quant_lr) < 0 or not 0 <= floor <= 1:
            raise ValueError(
                f"BlockAP(epochs={epochs}, weight_lr={weight_lr}, quant_lr={quant_lr}, floor={floor}): write for "
                "example BlockAP(epochs=2, weight_lr=1e-5, quant_lr=1e-4, floor=0.05)"
            )
        self.epochs, self.weight_lr, self.quant_lr, self.floor = epochs, weight_lr, quant_lr, floor

    def solve(self, task: BlockTask, *, generator: torch.Generator) -> Mapping[str, str]:
        sites = [site for group in task.groups for site in group]
        for site in sites:
            check_stepped("Block-AP", site)
        if not sites:
            return {}
        steps = [StepAndZero(site.quantizer.grid(site.weight)) for site in sites]
        with ExitStack() as stack:
            for site, step in zip(sites, steps, strict=True):
                stack.enter_context(standing_in(site, step))
            weights = [getattr(site.layer, site.prefix) for site in sites]
            share = learn(
                [(self.weight_lr, weights), (self.quant_lr, [p for step in steps for p in step.parameters()])],
                lambda i: _loss(task, i),
                batches=len(task.inputs["q"]),
                epochs=self.epochs,
                held_out=self.held_out,
                patience=self.patience,
                floor=self.floor,
                generator=generator,
                share=task.share,
            )
            values = [rounded(site.quantizer, site.weight).float() for site in sites]
        for site, found in zip(sites, values, strict=True):
            commit(site, SiteSolution(found), "values")
        return dict.fromkeys((site.name for site in sites), said(share))


class StepAndZero(Scale):
    """A step and an integer zero point that learn directly, both with straight-through clamps: s in [1e-4, 1e4], and
    round(z) inside the codes. Lives while a solver trains it; what it found is written into the quantizer's own scale.

    Args:
        grid: Where they begin.
    """

    learned = True
    offset = None

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.step = nn.Parameter(grid.scale.detach().float().clone())
        zero = grid.zero_point
        self.zero = None if zero is None else nn.Parameter(zero.detach().float().clone())

    def forward(self, blocks: Tensor, format: Format, ship: Ship) -> Grid:
        scale = ship(_through(self.step, self.step.clamp(1e-4, 1e4)))
        if self.zero is None:
            return Grid(scale)
        return Grid(scale, _through(self.zero, self.zero.round().clamp(format.low, format.high)))


def _through(x: Tensor, becomes: Tensor) -> Tensor:
    """`becomes` forward, the identity in x backward."""
    return becomes.detach() + (x - x.detach())


def check_stepped(solver: str, site: Site) -> None:
    """Raise ValueError where a weight has not one step for each of its groups, for a solver that trains it."""
    quantizer = site.quantizer
    if not isinstance(quantizer, Quantizer) or quantizer.grid(site.weight).tensor_scale is not None:
        raise ValueError(
            f"{site.name}: {solver} trains one step per group of a weight, which {quantizer!r} has not; write for "
            "example weight='int2-g64-asym'"
        )


def said(share: float | None) -> str:
    """What the report says of a held-out error."""
    return "" if share is None else f"{share:.3g} of the held-out error of rounding to nearest"


def _loss(task: BlockTask, index: int) -> Tensor:
    output = task.run(task.inputs["q"][index])
    return F.mse_loss(output.float(), task.targets["fp"][index].to(device_of(task.block)).float())
