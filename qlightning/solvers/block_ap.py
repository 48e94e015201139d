"""Block-AP: block-wise training of all parameters, the first phase of EfficientQAT."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlightning.capture import Site, device_of
from qlightning.numerics.formats import Format
from qlightning.numerics.gradients import ClippedSTE
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.scales import Grid, Scale, Ship
from qlightning.solvers.commit import commit, rounded
from qlightning.solvers.fixed import settle_on
from qlightning.solvers.solver import BlockSolver, BlockTask, SiteSolution


class BlockAP(BlockSolver):
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
        super().__init__(targets=("fp",), batches=batches, seed=seed)
        if epochs < 0 or min(weight_lr, quant_lr) < 0 or not 0 <= floor <= 1 or not 0 <= held_out < 1 or patience < 1:
            raise ValueError(
                f"BlockAP(epochs={epochs}, weight_lr={weight_lr}, quant_lr={quant_lr}, floor={floor}, "
                f"held_out={held_out}, patience={patience}): write for example BlockAP(epochs=2, weight_lr=1e-5, "
                "quant_lr=1e-4, floor=0.05, held_out=0.1, patience=2)"
            )
        self.epochs, self.weight_lr, self.quant_lr, self.floor = epochs, weight_lr, quant_lr, floor
        self.held_out, self.patience = held_out, patience

    def solve(self, task: BlockTask, *, generator: torch.Generator) -> Mapping[str, str]:
        sites = [site for group in task.groups for site in group]
        for site in sites:
            _check(site)
        if not sites:
            return {}
        with ExitStack() as stack:
            steps = [stack.enter_context(_stepping(site)) for site in sites]
            said = self._train(task, sites, steps, generator)
            values = [_values(site) for site in sites]
        for site, found in zip(sites, values, strict=True):
            commit(site, SiteSolution(found), "values")
        return dict.fromkeys((site.name for site in sites), said)

    def _train(
        self, task: BlockTask, sites: Sequence[Site], steps: Sequence["StepAndZero"], generator: torch.Generator
    ) -> str:
        weights = [getattr(site.layer, site.prefix) for site in sites]
        masters = [weight.detach().float().clone() for weight in weights]
        learned = [p for step in steps for p in step.parameters()]
        rates = ((self.weight_lr, masters), (self.quant_lr, learned))
        groups: list[dict[str, Any]] = [{"params": params, "lr": lr, "peak": lr} for lr, params in rates]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        trained, kept = self._split(len(task.inputs["q"]))
        total, taken, since = self.epochs * len(trained), 0, 0
        best = first = _error(task, kept)
        state = [t.detach().clone() for t in (*masters, *learned)]
        for weight in weights:
            weight.requires_grad_(True)
        for _ in range(self.epochs):
            for i in torch.randperm(len(trained), generator=generator).tolist():
                loss = _loss(task, trained[i])
                gradients = torch.autograd.grad(loss, [*weights, *learned], allow_unused=True)
                for parameter, gradient in zip((*masters, *learned), gradients, strict=True):
                    parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * cosine(taken / total, self.floor)
                optimizer.step()
                taken += 1
                _write(weights, masters)
            error, since = _error(task, kept), since + 1
            if error < best or not kept:
                best, since, state = error, 0, [t.detach().clone() for t in (*masters, *learned)]
            if since == self.patience:
                break
        with torch.no_grad():
            for parameter, value in zip((*masters, *learned), state, strict=True):
                parameter.copy_(value)
        _write(weights, masters)
        for weight in weights:
            weight.requires_grad_(False)
        return f"{best / first:.3g} of the held-out error of rounding to nearest" if kept and first else ""

    def _split(self, count: int) -> tuple[list[int], list[int]]:
        """Indices of batches that are learned from, and of those that are held out."""
        size = max(1, round(self.held_out * count)) if self.held_out and count > 1 else 0
        return list(range(count - size)), list(range(count - size, count))


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


def cosine(progress: float, floor: float) -> float:
    """From 1 at the start to `floor` at the end."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


@contextmanager
def _stepping(site: Site) -> Any:
    """The site's quantizer acts, with a step and zero point that learn; afterwards its own scale holds them."""
    quantizer = site.quantizer
    own: tuple[Any, Any, bool] = quantizer.scale, quantizer.gradient, quantizer.enabled
    steps = StepAndZero(quantizer.grid(site.weight)).to(site.weight.device)
    quantizer.scale, quantizer.gradient, quantizer.enabled = steps, ClippedSTE(edge="code"), True
    try:
        yield steps
        with torch.no_grad():
            settle_on(own[0], quantizer.grid(site.weight), quantizer.format)
    finally:
        quantizer.scale, quantizer.gradient, quantizer.enabled = own


def _check(site: Site) -> None:
    quantizer = site.quantizer
    if not isinstance(quantizer, Quantizer) or quantizer.grid(site.weight).tensor_scale is not None:
        raise ValueError(
            f"{site.name}: Block-AP trains one step per group of a weight, which {quantizer!r} has not; write for "
            "example weight='int2-g64-asym'"
        )


@torch.no_grad()
def _values(site: Site) -> Tensor:
    return rounded(site.quantizer, site.weight).float()


@torch.no_grad()
def _write(weights: Sequence[Tensor], masters: Sequence[Tensor]) -> None:
    for weight, master in zip(weights, masters, strict=True):
        weight.copy_(master)


def _loss(task: BlockTask, index: int) -> Tensor:
    output = task.run(task.inputs["q"][index])
    return F.mse_loss(output.float(), task.targets["fp"][index].to(device_of(task.block)).float())


@torch.no_grad()
def _error(task: BlockTask, indices: Sequence[int]) -> float:
    return sum(float(_loss(task, i)) for i in indices)
