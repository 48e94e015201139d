"""Learning in a block: tensors with float32 masters, the best epoch on held-out batches, and scales that stand in."""

import math
from abc import ABC
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qlightning.capture import Site
from qlightning.numerics.gradients import ClippedSTE
from qlightning.numerics.scales import Scale
from qlightning.solvers.fixed import settle_on
from qlightning.solvers.share import ALONE, Share
from qlightning.solvers.solver import BlockSolver, StreamName


class LearningSolver(BlockSolver, ABC):
    """A block solver that learns from some batches, and that the others tell when to stop.

    Args:
        targets: As `BlockSolver`'s.
        held_out: As `learn`'s.
        patience: As `learn`'s.
        batches: As `Solver`'s.
        seed: As `Solver`'s.
    """

    def __init__(
        self, *, targets: Sequence[StreamName], held_out: float, patience: int, batches: int, seed: int
    ) -> None:
        super().__init__(targets=targets, batches=batches, seed=seed)
        if not 0 <= held_out < 1 or patience < 1:
            name = type(self).__name__
            raise ValueError(
                f"{name}(held_out={held_out}, patience={patience}): a share below 1 and at least one, for example "
                f"{name}(held_out=0.1, patience=2)"
            )
        self.held_out, self.patience = held_out, patience


def learn(
    rates: Sequence[tuple[float, Sequence[Tensor]]],
    loss: Callable[[int], Tensor],
    *,
    batches: int,
    epochs: int,
    held_out: float,
    patience: int,
    floor: float = 1.0,
    generator: torch.Generator,
    share: Share = ALONE,
) -> float | None:
    """Adam on some tensors, in place; of all epochs (and none) the one stays in which held-out batches err least.

    The tensors take part in autograd meanwhile. Their dtype may be a short one: what Adam moves is float32.

    Args:
        rates: Tensors by learning rate.
        loss: Of one batch, by its index here.
        batches: Number of batches here.
        epochs: Passes over those that are not held out.
        held_out: Share of the batches that nothing is learned from and that tell when to stop; at least one batch of
            two or more, and none at 0, where the last epoch stays.
        patience: Epochs without a smaller held-out error after which learning ends.
        floor: What learning rates end at after a cosine, in units of where they begin.
        generator: On the CPU; the order of batches is drawn from it.
        share: With several processes, each step is one on a batch of any of them, and all take it.

    Returns:
        The held-out error as a share of that before, or None where nothing is held out.
    """
    tensors = [tensor for _, group in rates for tensor in group]
    masters = {id(tensor): tensor.detach().float().clone() for tensor in tensors}
    groups: list[dict[str, Any]] = [
        {"params": [masters[id(tensor)] for tensor in group], "lr": lr, "peak": lr} for lr, group in rates if group
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    trained, kept = split(share.count(batches), held_out)
    total, taken, since = epochs * len(trained), 0, 0
    best = first = _error(loss, kept, share)
    state = [master.clone() for master in masters.values()]
    for tensor in tensors:
        tensor.requires_grad_(True)
    for _ in range(epochs):
        for i in torch.randperm(len(trained), generator=generator).tolist():
            gradients = share.gradients(
                trained[i], lambda index: torch.autograd.grad(loss(index), tensors, allow_unused=True), tensors
            )
            for master, gradient in zip(masters.values(), gradients, strict=True):
                master.grad = None if gradient is None else gradient.to(master.dtype)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * cosine(taken / total, floor)
            optimizer.step()
            taken += 1
            _write(tensors, masters.values())
        error, since = _error(loss, kept, share), since + 1
        if error < best or not kept:
            best, since, state = error, 0, [master.clone() for master in masters.values()]
        if since == patience:
            break
    for tensor in tensors:
        tensor.requires_grad_(False)
    _write(tensors, state)
    return best / first if kept and first else None


def split(count: int, held_out: float) -> tuple[list[int], list[int]]:
    """Indices of batches that are learned from, and of those that are held out."""
    size = max(1, round(held_out * count)) if held_out and count > 1 else 0
    return list(range(count - size)), list(range(count - size, count))


def cosine(progress: float, floor: float) -> float:
    """From 1 at the start to `floor` at the end."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def _write(tensors: Sequence[Tensor], values: Any) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@torch.no_grad()
def _error(loss: Callable[[int], Tensor], numbers: Sequence[int], share: Share) -> float:
    return sum(share.over(numbers, lambda index: float(loss(index))))


@contextmanager
def standing_in(site: Site, scale: Scale) -> Iterator[None]:
    """A site's quantizer acts, on a scale that learns; afterwards its own scale holds what that has become."""
    quantizer = site.quantizer
    own: tuple[Any, Any, bool] = quantizer.scale, quantizer.gradient, quantizer.enabled
    quantizer.scale = scale.to(site.weight.device)
    quantizer.gradient, quantizer.enabled = ClippedSTE(edge="code"), True
    try:
        yield
        with torch.no_grad():
            settle_on(own[0], quantizer.grid(site.weight), quantizer.format)
    finally:
        quantizer.scale, quantizer.gradient, quantizer.enabled = own
