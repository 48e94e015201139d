"""LET: learnable equivalent transformations, found before training and folded away."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from qlightning.capture import Site
from qlightning.layers.layer import Twin
from qlightning.optim.zeroth_order import ZerothOrder
from qlightning.solvers.folding import Producer, find_producer, fold, takes_shift
from qlightning.solvers.moments import fan_in, groups_in, visible, watching
from qlightning.solvers.solver import BlockSolver, BlockTask


class LET(BlockSolver):
    """Scales and shifts of input channels, ZeroQAT's (arXiv 2509.00031): what inputs lose in range, weights take over.

    Layers see (x - shift) / s and have weights W diag(s) and biases b + W shift; what produces x is shifted and divided
    (a norm, the layer before), so that the float function stays and nothing is left to be done at inference. The shift
    begins in the middle of a channel's range, s at max|x - shift|^alpha / max|W|^(1 - alpha). Both then learn without
    backward, from the error of the quantized block's output: its weights on the grids of the folded weights, its inputs
    on their own where these need no calibration.

    Of a block without transformations, with the first ones and with the learned ones, the one that errs least on the
    data is kept. Where no module of the block takes the scale (see `folding.py`), a layer has none and the report says
    so; where a producer or a layer has no bias, as in Llama, there is no shift.

    Deviations: the paper learns s and shift along with the weights, against the task's loss; here they learn before, so
    that from the first step on there are the model's own parameters only (norms and biases, in which they lie, may go
    on). Queries and keys are not scaled against each other: with a step for each row that changes no code. What the
    released code calls an adaptive alpha is proportional to max|x| / max|W| between its extremes over the channels.

    Args:
        alpha: How much of the range the weights take over: 0.75, or (lowest, highest) for an adaptive one, for example
            (0.5, 0.7).
        shift: Whether channels are shifted to the "middle" of their range, or not ("none").
        steps: Of learning, for each block; 0 keeps the first transformations.
        lr: Learning rate for log s, and for the shift in units of a channel's half range, at a loss of 1 when it begins
            (and at most 2).
        eps: Size of the perturbation, in the same units.
        batches: Number of batches of calibration data.
        seed: Of the directions and of the forward passes' random numbers.
    """

    def __init__(
        self,
        *,
        alpha: float | tuple[float, float] = 0.75,
        shift: Literal["middle", "none"] = "middle",
        steps: int = 64,
        lr: float = 3e-4,
        eps: float = 1e-2,
        batches: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(targets=("fp",), batches=batches, seed=seed)
        low, high = alpha if isinstance(alpha, tuple) else (alpha, alpha)
        if not 0 <= low <= high <= 1 or shift not in ("middle", "none") or steps < 0 or not lr >= 0 or not eps > 0:
            raise ValueError(
                f"LET(alpha={alpha}, shift={shift!r}, steps={steps}, lr={lr}, eps={eps}): write for example "
                "LET(alpha=0.75, shift='middle', steps=64), or alpha=(0.5, 0.7)"
            )
        self.alpha, self.shift, self.steps, self.lr, self.eps = alpha, shift, steps, lr, eps

    @torch.no_grad()
    def solve(self, task: BlockTask, *, generator: torch.Generator) -> Mapping[str, str]:
        groups = [[site for site in group if visible(site)] for group in task.groups]
        notes = {site.name: "not transformed: its inputs are seen only by the layer" for g in task.groups for site in g}
        ranges = channel_ranges(groups, task)
        found: list[Equivalence] = []
        for group in groups:
            made = self._first(task, group, ranges, generator) if group else None
            if made is not None:
                found.append(made)
            note = "not transformed: nothing in its block takes the scale without a change of the float output"
            notes |= dict.fromkeys((site.name for site in group), note if made is None else made.said)
        for site in (site for group in task.groups for site in group):
            site.quantizer.initialize(site.weight)
        if not found:
            return notes
        share = self._learn(task, found)
        return {name: note if note.startswith("not") else f"{note}, {share}" for name, note in notes.items()}

    def _first(
        self, task: BlockTask, group: Sequence[Site], ranges: Mapping[str, "Range"], generator: torch.Generator
    ) -> "Equivalence | None":
        if any(site.name not in ranges or "transform" in site.layer._modules for site in group):
            return None
        producer = find_producer(task, group, generator=generator)
        if producer is None:
            return None
        low, high = ranges[group[0].name]
        shift = None
        if self.shift == "middle" and takes_shift(task, group, producer, generator=generator):
            shift = (low + high) / 2
        x = torch.maximum(low.abs(), high.abs()) if shift is None else (high - low) / 2
        w = torch.stack([site.weight.abs().amax(0) for site in group]).amax(0)
        return Equivalence(group, producer, first_scale(x, w.to(x), self.alpha), shift, x)

    def _learn(self, task: BlockTask, found: Sequence["Equivalence"]) -> str:
        """Learn, fold what errs least, and say how much it errs."""
        block, batches = _Foldable(task), range(task.share.count(len(task.inputs["q"])))
        theta = [nn.Parameter(torch.zeros_like(t)) for e in found for t in (e.scale, e.shift) if t is not None]
        tried: list[tuple[str, list[Tensor] | None]] = [("left out", None), ("as it began", [t.clone() for t in theta])]
        errors: list[float] = []
        with acting(task):
            for _, state in tried:
                block.fold(found, state)
                errors.append(block.error(batches))
            if self.steps and errors[1] > 0:
                optimizer = ZerothOrder(theta, self.lr, eps=self.eps, seed=self.seed)
                for i in islice(cycle(batches), self.steps):
                    optimizer.step(lambda i=i: self._loss(block, found, theta, i, errors[1]))  # type: ignore[misc]
                block.fold(found, theta)
                tried.append(("learned", [t.detach() for t in theta]))
                errors.append(block.error(batches))
        best = min(range(len(errors)), key=errors.__getitem__)
        block.fold(found, tried[best][1])
        return f"{tried[best][0]}, {errors[best] / errors[0] if errors[0] else 1.0:.3g} of the block's error without"

    def _loss(
        self, block: "_Foldable", found: Sequence["Equivalence"], theta: Sequence[Tensor], i: int, unit: float
    ) -> float:
        block.fold(found, theta)
        loss = block.error([i]) * block.task.share.count(len(block.task.inputs["q"])) / unit
        return loss if loss < 2 else 2.0  # also where it is NaN: no single direction throws everything over


class Range(NamedTuple):
    """Smallest and largest value of every input channel, (channels,)."""

    low: Tensor
    high: Tensor


class Equivalence(NamedTuple):
    """One transformation: what sees it, what takes it, how it begins, and the half range of its channels."""

    sites: Sequence[Site]
    producer: Producer
    scale: Tensor
    shift: Tensor | None
    reach: Tensor

    @property
    def said(self) -> str:
        return f"{'scaled' if self.shift is None else 'scaled and shifted'} into {self.producer.name}"


def first_scale(x: Tensor, w: Tensor, alpha: float | tuple[float, float]) -> Tensor:
    """x^a / w^(1 - a), and 1 for a channel in which either is 0.

    Args:
        x: (channels,) largest magnitude of inputs.
        w: (channels,) largest magnitude of weights.
        alpha: a, or its range: then it grows with x / w from the smallest to the largest.
    """
    ratio = x / w.clamp(min=torch.finfo(w.dtype).tiny)
    low, high = alpha if isinstance(alpha, tuple) else (alpha, alpha)
    span = ratio.max() - ratio.min()
    a = low + (high - low) * (ratio - ratio.min()) / (span if bool(span > 0) else 1.0)
    return torch.where((x > 0) & (w > 0), x.pow(a) / w.pow(1 - a), torch.ones_like(x))


def channel_ranges(groups: Sequence[Sequence[Site]], task: BlockTask) -> dict[str, Range]:
    """What each input channel spans on the float stream, by site; not of layers whose groups see different inputs."""
    sites = [site for group in groups for site in group if groups_in(site) == 1]
    nothing = {site.name: site.weight.new_full(site.weight.shape[1:], float("inf")) for site in sites}
    found = {name: Range(infinite, -infinite) for name, infinite in nothing.items()}

    def see(site: Site, x: Tensor) -> None:
        before, (low, high) = found[site.name], torch.aminmax(fan_in(site.layer, x)[0], dim=0)
        found[site.name] = Range(torch.minimum(before.low, low), torch.maximum(before.high, high))

    with watching(sites, see):
        task.run_all("fp")
    for name, (low, high) in found.items():
        lowest, highest = (task.share.largest(bound).to(low) for bound in (-low, high.clone()))
        found[name] = Range(-lowest, highest)
    return {name: span for name, span in found.items() if bool((span.low <= span.high).all())}


class _Foldable:
    """A block whose parameters are folded anew, from where they were, for every loss."""

    def __init__(self, task: BlockTask) -> None:
        self.task, self.sites = task, [site for group in task.groups for site in group]
        self._before = [(p, p.detach().clone()) for p in task.block.parameters()]

    def fold(self, found: Sequence[Equivalence], theta: Sequence[Tensor] | None) -> None:
        """Fold s exp(theta) and shift + reach theta; nothing where theta is None."""
        for parameter, value in self._before:
            parameter.detach().copy_(value)
        moved = iter(theta or ())
        for e in found if theta is not None else ():
            s = e.scale * next(moved).exp()
            fold(e.sites, e.producer, s, None if e.shift is None else e.shift + e.reach * next(moved))
        for site in self.sites:
            site.quantizer.initialize(site.weight)

    def error(self, batches: Iterable[int]) -> float:
        """Squared distance of the block's output from the float one, on some batches of all."""
        task = self.task

        def distance(i: int) -> float:
            output = task.run(task.inputs["q"][i])
            return float((output.double() - task.targets["fp"][i].to(output.device).double()).square().sum())

        return sum(task.share.over(batches, distance))


@contextmanager
def acting(task: BlockTask) -> Iterator[None]:
    """The block's solved weights are quantized, and all inputs and outputs whose quantizers need no calibration."""
    switched = [site.quantizer for group in task.groups for site in group]
    for layer in task.block.modules():
        if isinstance(layer, Twin):
            switched += [q for prefix, q in layer.quantizers() if prefix not in layer.weights() and q.ready]
    for quantizer in switched:
        quantizer.enabled = True
    try:
        yield
    finally:
        for quantizer in switched:
            quantizer.enabled = False
