"""Training without backward: the slope along one random direction, from two forward passes (SPSA).

ZeroQAT: End-to-End On-Device QAT for LLMs at Inference Cost (Tan et al. 2025, arXiv 2509.00031). Nothing is saved for
backward and the optimizer has no state: the direction z is drawn anew from a seed whenever it is needed.

Deviation: the parameters come back from a copy, bit for bit. theta + eps z - 2 eps z + eps z needs no copy but leaves
rounding errors behind that are as large as small updates; `restore="regenerate"` does it so, as the paper.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from qlightning.evaluation.random_state import random_state, restore_random_state

Restore = Literal["copy", "regenerate"]


class Probe(NamedTuple):
    """The losses of one step, at theta + eps z and at theta - eps z."""

    plus: float
    minus: float


class ZerothOrder(Optimizer):
    """theta <- theta - lr g z with g = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps) and z standard normal.

    `step` takes a closure that returns the loss of one and the same batch every time; both calls see the same random
    numbers. Processes hold equal parameters and average the two losses, nothing else.

    Args:
        params: Parameters or groups of them, in float32 or float64; those that do not require a gradient stay.
        lr: Learning rate; the paper uses 1e-7 to 1e-6, constant.
        eps: Size of the perturbation. If it is small beside the step of a quantizer, no code flips and nothing is
            measured.
        seed: Of the directions.
        restore: Parameters come back from a "copy", bit for bit, or are moved back ("regenerate"), with less memory.

    Attributes:
        probe: What the last step measured.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        *,
        eps: float = 1e-3,
        seed: int = 0,
        restore: Restore = "copy",
    ) -> None:
        if not lr >= 0 or not eps > 0:
            raise ValueError(f"lr={lr}, eps={eps}: write for example ZerothOrder(params, lr=1e-6, eps=1e-3)")
        if restore not in ("copy", "regenerate"):
            raise ValueError(f"restore={restore!r}: write restore='copy' or restore='regenerate'")
        self.seed, self.restore = seed, restore
        self.probe: Probe | None = None
        super().__init__(params, {"lr": lr, "eps": eps, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """One step.

        Returns:
            The mean of the two losses.

        Raises:
            ValueError: No closure, a loss that is missing or not finite, or parameters that cannot take small updates.
        """
        if closure is None:
            raise ValueError("forward-only training measures losses itself: write optimizer.step(lambda: loss(batch))")
        direction = _Direction(self.param_groups, seed=self.seed)
        with direction.returning(self.restore):
            random = random_state()
            direction.go_to(1.0)
            plus = _value(closure())
            restore_random_state(random)
            direction.go_to(-1.0)
            minus = _value(closure())
        self.probe = plus, minus = _mean(Probe(plus, minus), direction.device)
        direction.descend((plus - minus) / 2)
        for group in self.param_groups:
            group["steps"] += 1
        return (plus + minus) / 2


class _Direction:
    """The line theta + where * eps z through the parameters of one step."""

    def __init__(self, groups: list[dict[str, Any]], *, seed: int) -> None:
        self._moved: list[tuple[Tensor, dict[str, Any]]] = []
        for group in groups:
            self._moved += [(p, group) for p in group["params"] if p.requires_grad]
        if not self._moved:
            raise ValueError("no parameter may be moved: none requires a gradient")
        for p, _ in self._moved:
            _check(p)
        self.device = self._moved[0][0].device
        self._seed = (seed * 0x9E3779B97F4A7C15 + groups[0]["steps"]) % 2**63
        self._copies: list[Tensor] | None = None
        self._at = 0.0

    def z(self) -> Iterator[tuple[Tensor, dict[str, Any], Tensor]]:
        """(parameter, its group, its part of the direction), one after the other; the same every time."""
        generators: dict[torch.device, torch.Generator] = {}
        for p, group in self._moved:
            if p.device not in generators:
                generators[p.device] = torch.Generator(p.device).manual_seed(self._seed)
            yield p, group, torch.randn(p.shape, generator=generators[p.device], device=p.device, dtype=p.dtype)

    @contextmanager
    def returning(self, how: Restore) -> Iterator[None]:
        """Whatever happens, the parameters are at theta again in the end."""
        self._copies = [p.clone() for p, _ in self._moved] if how == "copy" else None
        try:
            yield
        finally:
            self.go_to(0.0)
            self._copies = None

    def go_to(self, where: float) -> None:
        if self._copies is not None:
            for (p, _), copy in zip(self._moved, self._copies, strict=True):
                p.copy_(copy)
            self._at = 0.0
        if where != self._at:
            for p, group, z in self.z():
                p.add_(z, alpha=(where - self._at) * group["eps"])
            self._at = where

    def descend(self, half: float) -> None:
        """Step against the slope: `half` is half the difference of the losses."""
        for p, group, z in self.z():
            p.sub_(z, alpha=group["lr"] * half / group["eps"])


def _check(p: Tensor) -> None:
    if p.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"a parameter is {p.dtype}, in which small updates are lost: keep float32 masters, for example "
            "Trainer(precision='bf16-mixed')"
        )
    if hasattr(p, "placements"):  # a DTensor
        raise ValueError("a parameter is sharded, but every process has to draw the same direction: use strategy='ddp'")


def _value(loss: Any) -> float:
    if loss is None:
        raise ValueError("the closure returned no loss: return the loss of the batch")
    value = float(loss)
    if not abs(value) < float("inf"):
        raise ValueError(f"the loss of the perturbed model is {value}: take a smaller eps, or look at the data")
    return value


def _mean(probe: Probe, device: torch.device) -> Probe:
    """Over processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return probe
    losses = torch.tensor(probe, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(losses)
    return Probe(*(losses / torch.distributed.get_world_size()).tolist())
