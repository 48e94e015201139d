"""The quantizer's backward pass on the shards.

What comes back through gathered codes is the gradient of the quantized weight. Straight-through masks and the gradients
of learned scales are linear in it, so that they may as well be taken after the gradient was averaged over the
processes, on the rows of each: masks give the same bits, sums the same up to the order of additions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from qlightning.strategies.gather import CodeGather, KeptGather


@contextmanager
def finished_on_shards(gathers: Sequence[CodeGather | KeptGather]) -> Iterator[None]:
    """Around a backward pass: gradients that go through quantizers are made of those of quantized weights.

    What an earlier backward pass accumulated is added afterwards.
    """
    learning = [g for g in gathers if isinstance(g, CodeGather) and g.parameter.requires_grad]
    waiting = [gather for gather in learning if gather.quantizer.needs_input]
    earlier = [_taken(gather.parameter) for gather in waiting]
    try:
        yield
        for gather in waiting:
            if gather.coded and gather.parameter.grad is not None:
                _finish(gather)
    finally:
        for gather, gradient in zip(waiting, earlier, strict=True):
            _give_back(gather.parameter, gradient)


def _taken(parameter: DTensor) -> Tensor | None:
    gradient, parameter.grad = parameter.grad, None
    return gradient


def _give_back(parameter: DTensor, gradient: Tensor | None) -> None:
    if gradient is not None:
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


@torch.no_grad()
def _finish(gather: CodeGather) -> None:
    quantizer = gather.quantizer
    assert isinstance(gather.parameter.grad, DTensor)
    gradient = gather.parameter.grad.to_local()
    scales = {name: tensor.detach().requires_grad_() for name, tensor in gather.scales_here().items()}
    with gather.on_shard(scales):
        with torch.enable_grad():
            state = tuple(gather.grid())
        if not gather.rows.held:  # nothing to say, but of a scale of the whole tensor it has a share
            for name, scale in scales.items():
                _add(gather, name, torch.zeros_like(scale))
            return
        wanted = [tensor is not None and tensor.requires_grad for tensor in state]
        constants = tuple(None if tensor is None else tensor.detach() for tensor in state)
        rows = gradient.reshape(gather.matrix.shape)
        grad, *grads = quantizer.gradients(rows, gather.matrix, constants, None, wanted)
    gradient.copy_(grad.view(gradient.shape))
    if not scales:
        return
    moved = [(tensor, g) for tensor, g in zip(state, grads, strict=True) if tensor is not None and g is not None]
    outputs, given = zip(*moved, strict=True)
    found = torch.autograd.grad(outputs, list(scales.values()), given, allow_unused=True)
    for name, scale, own in zip(scales, scales.values(), found, strict=True):
        _add(gather, name, torch.zeros_like(scale) if own is None else own)


def _add(gather: CodeGather, name: str, own: Tensor) -> None:
    """Add to the gradient of a scale what these rows say of it."""
    scale = gather.scales[name].parameter
    if not scale.requires_grad:
        return
    if gather.quantizer.granularity.shared_rows is None:
        own = own * _share(gather)
        dist.all_reduce(own, group=gather.group)
    if scale.grad is None:
        scale.grad = torch.zeros_like(scale)
    assert isinstance(scale.grad, DTensor)
    if (gradient := scale.grad.to_local()).numel():
        gradient.add_(own.to(gradient.dtype))


def _share(gather: CodeGather) -> float:
    """By how much the elements of all rows damp the gradient of a scale more than those of these rows."""
    rule, format, here = gather.quantizer.gradient, gather.quantizer.format, gather.matrix.numel()
    return rule.scale_factor(gather.rows.total * gather.columns, format) / rule.scale_factor(max(here, 1), format)
