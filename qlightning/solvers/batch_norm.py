"""Batch norms folded into the layers before them, and repaired once those are quantized ("para-normalisation").

Hubara et al., ICML 2021, arXiv 2006.10518. A folded norm stays where it is as an identity that still knows the mean and
the spread that training gave its channels: running mean beta, running variance gamma^2, weight sqrt(gamma^2 + eps) and
bias beta. Quantization moves the statistics of what the layer returns; measured anew in such a norm, they are moved
back to beta and gamma. Folded in once more, with the steps of the weight, not one integer code changes.

A norm that was never folded is repaired by the same measurement alone, and then there is nothing to fold.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from qlightning.capture import Forward, Site, device_of, run_batch, run_step
from qlightning.evaluation.modes import eval_mode, not_observing, silent
from qlightning.evaluation.random_state import random_state, restore_random_state
from qlightning.layers.layer import Twin
from qlightning.layers.sharding import is_sharded
from qlightning.numerics.learned import Learned, Static
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.scales import Grid
from qlightning.solvers.fixed import settle_on
from qlightning.solvers.folding import wide
from qlightning.solvers.moments import write
from qlightning.solvers.share import ALONE, Share, several, share_of

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Normalized(NamedTuple):
    """A layer whose output a batch norm sees, and nothing else.

    Attributes:
        name: The layer's.
        layer: Linear or a convolution, plain or converted.
        norm: The norm.
    """

    name: str
    layer: nn.Module
    norm: _BatchNorm


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch norms with statistics of their own, in the order of definition."""
    return [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.running_mean is not None]


@torch.no_grad()
def find_normalized(module: nn.Module, run: Callable[[], Any]) -> list[Normalized]:
    """The layers that can take in the batch norm behind them.

    Found by trying: if everybody but the norm is handed NaN in place of what the layer returns, what `run` returns must
    stay, bit for bit.

    Args:
        module: Plain or converted.
        run: Runs the module and returns its output, the same every time.
    """
    returned: dict[int, tuple[str, nn.Module]] = {}
    alive: list[Any] = []  # so that no other tensor gets the id of one seen before
    pairs: list[Normalized] = []

    def after(name: str, layer: nn.Module, output: Any) -> None:
        alive.append(output)
        returned[id(output)] = (name, layer)

    def before(norm: nn.Module, args: Any) -> None:
        if args and id(args[0]) in returned and isinstance(norm, _BatchNorm) and norm.affine:
            pairs.append(Normalized(*returned[id(args[0])], norm))

    with eval_mode(module):
        with ExitStack() as stack:
            for name, layer in module.named_modules():
                if type(layer) in _PLAIN or (isinstance(layer, Twin) and "weight" in layer.weights()):
                    hook = layer.register_forward_hook(lambda m, args, output, n=name: after(n, m, output))  # type: ignore[misc]
                    stack.callback(hook.remove)
            for norm in batch_norms(module):
                stack.callback(norm.register_forward_pre_hook(before).remove)
            expected = run()
        return [pair for pair in pairs if _alone(pair, run, expected)]


def _alone(pair: Normalized, run: Callable[[], Any], expected: Any) -> bool:
    kept: list[Tensor] = []

    def hide(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        kept.append(output)
        return torch.full_like(output, float("nan"))

    hooks = [
        pair.layer.register_forward_hook(hide),
        pair.norm.register_forward_pre_hook(lambda norm, args: (kept[-1],)),
    ]
    try:
        found = run()
    finally:
        for hook in hooks:
            hook.remove()
    tensors = [[leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (expected, found)]
    same = all(torch.equal(one, other) for one, other in zip(*tensors, strict=True))
    return same and len(kept) == 1


@torch.no_grad()
def fold_norm(pair: Normalized) -> None:
    """Let the layer do what the norm does in eval mode, and make an identity of the norm that remembers its channels.

    A layer without a bias gets one, so fold before optimizers are built. Scales that are state follow the weight.
    """
    norm, layer = pair.norm, pair.layer
    gamma, beta = norm.weight.detach().clone(), norm.bias.detach().clone()
    factor, shift = _affine(norm)
    if isinstance(layer, Twin):
        site = Site(pair.name, layer, "weight")
        write(site, _scaled(site.weight, factor))
        if layer.quantizer("weight") is not None:
            site.quantizer.initialize(site.weight)
    else:
        weight: Any = layer.weight
        weight.copy_(_scaled(weight, factor))
    _change_bias(layer, factor, shift)
    norm.weight.copy_((wide(gamma).square() + norm.eps).sqrt())
    _remember(norm, beta, wide(gamma).square())


@torch.no_grad()
def refold_norm(pair: Normalized) -> None:
    """Fold a folded norm again, once its statistics were measured anew: the integer codes of the weight stay.

    Raises:
        ValueError: Channels of the weight share a step, so that they cannot be scaled one by one; its values are no
            integers times a step.
    """
    norm, layer = pair.norm, pair.layer
    if not isinstance(layer, Twin) or not isinstance(quantizer := layer.quantizer("weight"), Quantizer):
        raise ValueError(f"{pair.name} has no codes to keep: convert it first, or fold its norm with fold_norm(pair)")
    factor, shift = _affine(norm)
    _scale_with_steps(Site(pair.name, layer, "weight"), quantizer, factor)
    _change_bias(layer, factor, shift)
    _remember(norm, norm.bias.detach().clone(), wide(norm.weight.detach()).square() - norm.eps)


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """What the norm multiplies with and adds, per channel, in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = wide(norm.weight) * (wide(norm.running_var) + norm.eps).rsqrt()
    return factor, wide(norm.bias) - norm.running_mean * factor


def _remember(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)


def _scaled(weight: Tensor, factor: Tensor) -> Tensor:
    """Each output channel, the first dimension, times its factor."""
    return (wide(weight) * factor.view(-1, *(1,) * (weight.dim() - 1))).to(weight.dtype)


def _change_bias(layer: nn.Module, factor: Tensor, shift: Tensor) -> None:
    if (bias := layer._parameters.get("bias")) is None:
        like: Any = layer.weight
        layer.register_parameter("bias", nn.Parameter(shift.to(like.dtype)))
    else:
        bias.copy_(wide(bias) * factor + shift)


def _scale_with_steps(site: Site, quantizer: Quantizer, factor: Tensor) -> None:
    """Multiply output channels and their steps, so that codes and zero points stay."""
    weight, scale = site.weight, quantizer.scale
    codes, grid = quantizer.quantize(weight).codes, quantizer.grid(weight)
    blocks = quantizer.granularity.view(factor[:, None].expand(weight.shape).contiguous())
    if not torch.equal(blocks.amin(-1), blocks.amax(-1)) or quantizer.transform is not None:
        raise ValueError(
            f"{site.name}: its channels share a step of {quantizer!r} and cannot be scaled one by one: write a step "
            "for each, for example weight='int4-channel-asym'"
        )
    if isinstance(scale, Static):
        held = scale.inner if isinstance(scale, Learned) else None
        settle_on(scale, Grid(grid.scale * blocks[..., :1], grid.zero_point), quantizer.format)
        if held is not None:
            held.copy_((grid.step if grid.inner is None else grid.inner) * blocks[..., :1])
    scaled = _scaled(weight, factor)
    moved = quantizer.quantize(scaled)
    values = quantizer.dequantize(moved._replace(codes=codes), weight.dtype)
    write(site, torch.where(moved.codes == codes, scaled, values))  # what lay halfway between two codes may have moved
    if not torch.equal(quantizer.quantize(site.weight).codes, codes):
        raise ValueError(f"{site.name}: {quantizer!r} does not keep the codes of a weight whose channels are scaled")


@torch.no_grad()
def reestimate(module: nn.Module, batches: Iterable[Any], *, forward: Forward = run_step, seed: int = 0) -> int:
    """Measure the mean and variance of every batch norm anew, as the model is now: the mean over the batches.

    Everything else of the model runs in eval mode, and quantizers act or not as they do. Random numbers are afterwards
    as before. Several processes (`torch.distributed`) call it together: the mean is over the batches of all, and where
    all read the same ones, each takes other ones.

    Args:
        module: With batch norms.
        batches: Calibration data.
        forward: Runs the module on a batch.
        seed: Batch i draws its random numbers from `seed + i`.

    Returns:
        How many norms there are.

    Raises:
        ValueError: There are none, or no data; processes that must run in step have not as many batches each.
    """
    norms = batch_norms(module)
    if not norms:
        raise ValueError(
            f"{type(module).__name__} has no batch norms whose statistics could be measured anew; its other norms keep "
            "none"
        )
    data, share = share_of(batches, None, device_of(module)) if several() else (batches, ALONE)
    _check_in_step(module, norms, share)
    before, seen, momenta = random_state(), 0, [norm.momentum for norm in norms]
    with eval_mode(module), not_observing(module), silent(module):
        try:
            for norm in norms:
                norm.training, norm.momentum = True, None  # None: every batch counts alike
                norm.reset_running_stats()
            for i, batch in enumerate(data):
                run_batch(module, batch, forward, seed + share.number(i))
                seen += 1
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            restore_random_state(before)
    if not (total := share.count(seen)):
        raise ValueError("there is no data to measure on: reestimate(module, batches) takes at least one batch")
    for norm in norms:
        _pool(norm, share, here=seen, total=total)
    return len(norms)


def _check_in_step(module: nn.Module, norms: list[_BatchNorm], share: Share) -> None:
    meets = any(isinstance(norm, nn.SyncBatchNorm) for norm in norms) or any(map(is_sharded, module.parameters()))
    if meets and len(set(share.counts)) > 1:
        raise ValueError(
            "a sharded model, or one whose norms are synchronized, runs in step in all processes, but they have "
            f"{list(share.counts)} batches: give each as many, reestimate(module, batches[:{min(share.counts)}])"
        )


@torch.no_grad()
def _pool(norm: _BatchNorm, share: Share, *, here: int, total: int) -> None:
    """The mean over the batches of all processes of what is now the mean over those of this one."""
    for statistic in (norm.running_mean, norm.running_var) if not share.alone else ():
        assert statistic is not None
        statistic.copy_(share.sum(statistic.double() * (here / total)))
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(total)
