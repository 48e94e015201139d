"""AWQ: activation-aware weight quantization."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qlightning.capture import Site
from qlightning.numerics.quantizer import Quantizer
from qlightning.solvers.commit import commit, rounded
from qlightning.solvers.folding import answers_boundedly, find_producer, fold
from qlightning.solvers.moments import Moments, gather, visible, write
from qlightning.solvers.output_clip import clip_for_outputs, rowwise
from qlightning.solvers.solver import BlockSolver, BlockTask, SiteSolver
from qlightning.solvers.units import enclosing, seen_by


class AWQ(BlockSolver):
    """Lin et al., MLSys 2024, arXiv 2306.00978: larger grids for the input channels that carry large activations.

    Parameters change, the float function does not: weights become W diag(s), and what produces their input is divided
    by s (a norm's weight and bias, the rows of the layer before). s is a^alpha over the root of its extremes, a the
    mean magnitude of an input channel, alpha the one of a grid at which the module around the layers errs least when
    they are rounded. Weights that share an input share s. Then each group of a weight is clipped, but not of queries
    and keys.

    Where no module of the block takes the scale without a change of its float output (grouped queries, an activation
    function other than ReLU, a mixture's router in float, the first layer of a block), the weight keeps its scale and
    the report says so.

    Deviations: what a scale folds into is found by trying, not by names (see `folding.py`), and so are queries and
    keys, so that a projection of all three in one is clipped. The paper multiplies activations by 1 / s where nothing
    takes it; here such weights stay. A group's clipping error is over all calibration tokens, the paper's over 512.

    Args:
        grid: Number of alphas: 0, 1 / grid, ... below 1.
        shrink: Largest share by which a group's range is clipped; 0 for no clipping.
        clip_grid: Steps of the clipping search over the whole range.
        then: Another solver of single weights that rounds what has been scaled and clipped, for example `GPTQ()`, with
            AWQ's batches and seed. Without one weights stay as they are, and their quantizers round to nearest.
        batches: Number of batches of calibration data; the paper has 128 sequences of 512 tokens.
        seed: Of the forward passes' random numbers.
    """

    def __init__(
        self,
        *,
        grid: int = 20,
        shrink: float = 0.5,
        clip_grid: int = 20,
        then: SiteSolver | None = None,
        batches: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(targets=(), batches=batches, seed=seed)
        if grid < 1 or clip_grid < 1 or not 0 <= shrink < 1:
            raise ValueError(
                f"AWQ(grid={grid}, shrink={shrink}, clip_grid={clip_grid}): write for example AWQ(grid=20, shrink=0.5, "
                "clip_grid=20), and shrink=0 for no clipping"
            )
        if then is not None and then.final:
            raise ValueError(
                f"AWQ(then={then!r}): its solutions lie on no grid of the layer's quantizer; write AWQ(then=GPTQ()) or "
                "AWQ(then=LDLQ())"
            )
        if then is not None and (then.batches, then.seed) != (batches, seed):
            name = type(then).__name__
            raise ValueError(
                f"one calibration has one number of batches and one seed: write AWQ(batches={batches}, seed={seed}, "
                f"then={name}(batches={batches}, seed={seed}))"
            )
        self.grid, self.shrink, self.clip_grid, self.then = grid, shrink, clip_grid, then

    @torch.no_grad()
    def solve(self, task: BlockTask, *, generator: torch.Generator) -> Mapping[str, str]:
        groups = [[site for site in group if visible(site)] for group in task.groups]
        groups = [group for group in groups if group]
        moments = gather(groups, lambda: task.run_all("fp"), task.share)
        notes: dict[str, list[str]] = {site.name: [] for group in task.groups for site in group}
        for group in groups:
            note = self._scale(task, group, moments, generator)
            for site in group:
                notes[site.name].append(note)
        if self.shrink:
            # asked of all first, since a clipped neighbour would change the answer
            spared = {site.name for group in groups for site in group if answers_boundedly(task, site)}
            for site in (site for group in groups for site in group):
                notes[site.name].append(self._clip(site, moments[site.name], spared))
        for site in (site for group in task.groups for site in group):
            site.quantizer.initialize(site.weight)
            if not notes[site.name]:
                notes[site.name].append("rounded to nearest: its inputs are seen only by the layer")
        if self.then is not None:
            self._round(self.then, task, groups, moments, generator)
        return {name: "; ".join(filter(None, said)) for name, said in notes.items()}

    def _scale(
        self, task: BlockTask, group: Sequence[Site], moments: dict[str, Moments], generator: torch.Generator
    ) -> str:
        """Find a group's scale and fold it. Returns what the report should say."""
        seen = moments[group[0].name]
        if len(seen.gram) > 1 or any(moments[site.name] is not seen for site in group):
            return "not scaled: its inputs are not one row of channels"
        producer = find_producer(task, group, generator=generator)
        if producer is None:
            return "not scaled: nothing in its block takes the scale without a change of the float output"
        found = self._search(task, group, (seen.abs_sum[0] / seen.total).float())
        fold(group, producer, found.scale)
        for site in group:
            moments[site.name] = _divided(seen, found.scale) if site is group[0] else moments[group[0].name]
        return f"alpha {found.alpha:g} into {producer.name}, {found.loss:.3g} of the error at alpha 0"

    def _search(self, task: BlockTask, group: Sequence[Site], magnitude: Tensor) -> "_Found":
        name = enclosing(task.block, group)
        around = BlockTask(task.block.get_submodule(name), [group], {}, {})
        observed = seen_by(task.block, name, task.inputs["fp"])

        def error(i: int) -> float:
            call, output = observed[i]
            return float((around.run(call).cpu().double() - output.double()).square().sum())

        weights = [site.weight.clone() for site in group]
        unscaled, best = 0.0, _Found(torch.ones_like(magnitude), 0.0, float("inf"))
        for i in range(self.grid):
            s = channel_scale(magnitude, i / self.grid)
            for site, weight in zip(group, weights, strict=True):
                scaled = (weight.float() * s).to(weight.dtype)
                site.quantizer.initialize(scaled)
                write(site, (rounded(site.quantizer, scaled).float() / s).to(weight.dtype))
            loss = sum(task.share.over(range(task.share.count(len(observed))), error))
            unscaled = unscaled if i else loss
            if loss < best.loss:
                best = _Found(s, i / self.grid, loss)
        for site, weight in zip(group, weights, strict=True):
            write(site, weight)
        return best._replace(loss=best.loss / unscaled if unscaled else 1.0)

    def _clip(self, site: Site, moments: Moments, spared: set[str]) -> str:
        if site.name in spared:
            return "not clipped: what is around it answers boundedly, as to queries and keys"
        quantizer, weight = site.quantizer, site.weight
        plain = isinstance(quantizer, Quantizer) and quantizer.transform is None and rowwise(quantizer, weight)
        if not plain or len(moments.gram) > 1:
            return "not clipped: its scales are not shared by pieces of rows alone"
        write(site, clip_for_outputs(weight, moments.hessian[0], quantizer, shrink=self.shrink, steps=self.clip_grid))
        return ""

    def _round(
        self,
        then: SiteSolver,
        task: BlockTask,
        groups: Sequence[Sequence[Site]],
        moments: dict[str, Moments],
        generator: torch.Generator,
    ) -> None:
        """Solve weight after weight as the engine would; each acts from then on."""
        for stage in ([group] for group in groups) if then.refresh == "group" else [groups]:
            if then.stream == "q":
                moments = gather(stage, lambda: task.run_all("q"), task.share)
            for site in (site for group in stage for site in group):
                weight = site.weight.clone()
                solution = then.solve(weight, moments[site.name], quantizer=site.quantizer, generator=generator)
                commit(site, solution, then.commit)


class _Found(NamedTuple):
    scale: Tensor
    alpha: float
    loss: float


def channel_scale(magnitude: Tensor, alpha: float) -> Tensor:
    """max(a^alpha, 1e-4), divided by the root of its largest times its smallest value.

    Args:
        magnitude: (channels,) mean |x|, float32.
        alpha: In [0, 1); at 0 the scale is 1 exactly.
    """
    s = magnitude.pow(alpha).clamp(min=1e-4)
    return s / (s.max() * s.min()).sqrt()


def _divided(moments: Moments, s: Tensor) -> Moments:
    """Moments of inputs that are divided by a scale of their channels."""
    s = s.to(moments.gram)
    divided = Moments(moments.gram / (s[:, None] * s), moments.total)
    divided.tokens = moments.tokens
    divided.absmax, divided.sum, divided.abs_sum = (t / s for t in (moments.absmax, moments.sum, moments.abs_sum))
    return divided
