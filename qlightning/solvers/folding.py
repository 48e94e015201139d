"""Folding: scales and shifts of a weight's input channels go into whatever produces this input; the function stays.

Which module that is, no architecture has to say. A candidate is a module that runs before the layer and has as many
output channels as the layer has inputs; it is the producer if scaling the layer's columns by powers of two and its own
rows by their inverses leaves the block's output as it was, bit for bit. Powers of two are exact in floating point, so
whatever lies between (an attention's average over tokens, a product with a gate, a ReLU) passes just when it passes a
scale of each channel; a GELU, a softmax or a second reader of the same input does not.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qlightning.capture import Call, Site, call_until_stopped, sites_of, stop_forward
from qlightning.layers.layer import Twin
from qlightning.solvers.moments import write
from qlightning.solvers.solver import BlockTask
from qlightning.solvers.units import seen_by, surrounding, unit_of


class Producer(NamedTuple):
    """A module whose output channels can be scaled: a norm, a linear layer, a convolution.

    Attributes:
        name: In its block.
        module: Has a parameter `weight` whose rows are the output channels, and perhaps a `bias`.
    """

    name: str
    module: nn.Module

    @property
    def rows(self) -> Tensor:
        """The weight with output channels first, outside autograd."""
        weight = self.module.weights()["weight"] if isinstance(self.module, Twin) else self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    @property
    def bias(self) -> Tensor | None:
        """What is added to the output channels, outside autograd."""
        return None if (bias := self.module._parameters.get("bias")) is None else bias.detach()

    def divide(self, s: Tensor) -> None:
        """Divide what it produces by a scale (output channels,), in place."""
        rows = self.rows
        divided = (wide(rows) / s.view(-1, *(1,) * (rows.dim() - 1))).to(rows.dtype)
        if isinstance(self.module, Twin):
            write(Site(self.name, self.module, "weight"), divided)
        else:
            rows.copy_(divided)
        if self.bias is not None:
            self.bias.copy_(wide(self.bias) / s)

    def lower(self, by: Tensor) -> None:
        """Subtract a vector (output channels,) from what it produces, in place."""
        assert self.bias is not None
        self.bias.copy_(wide(self.bias) - by)


def wide(tensor: Tensor) -> Tensor:
    """In float32, or in float64 if it is so already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.no_grad()
def scale_columns(sites: Sequence[Site], s: Tensor) -> None:
    """Multiply the input channels of weights by a scale (fan-in,), in place."""
    for site in sites:
        weight = site.weight
        write(site, (wide(weight) * s).to(weight.dtype))


@torch.no_grad()
def fold(sites: Sequence[Site], producer: Producer, s: Tensor, shift: Tensor | None = None) -> None:
    """Let layers see (x - shift) / s in place of x, and compute what they did, by parameters alone.

    Args:
        sites: All quantized weights that see x.
        producer: Of x.
        s: (fan-in,).
        shift: (fan-in,), where the producer and the layers have biases and `takes_shift` holds.
    """
    if shift is not None:
        for site in sites:
            bias = site.layer._parameters["bias"]
            assert bias is not None
            bias.copy_(wide(bias) + wide(site.weight) @ shift.to(wide(site.weight)))
        producer.lower(shift)
    scale_columns(sites, s)
    producer.divide(s)


@torch.no_grad()
def find_producer(task: BlockTask, sites: Sequence[Site], *, generator: torch.Generator) -> Producer | None:
    """What a scale of the input channels of `sites`, which share an input, can be folded into, or None.

    The block is run on the first batch of the float stream, once for every candidate, the last to run first. What a
    producer does outside of its block is not seen: one that several blocks share would have to be left alone by name.

    Args:
        task: The block, its weights in float.
        sites: All quantized weights that see this input.
        generator: On the CPU; draws the powers of two.
    """
    name = task.share.decide(lambda: _producer(task, sites, generator), generator)
    return None if name is None else Producer(name, task.block.get_submodule(name))


def _producer(task: BlockTask, sites: Sequence[Site], generator: torch.Generator) -> str | None:
    """Its name."""
    call, features = task.inputs["fp"][0], sites[0].weight.shape[1]
    candidates = [c for c in _run_before(task, sites, call) if len(c.rows) == features]
    if not candidates:
        return None
    s = torch.exp2(torch.randint(-1, 2, (features,), generator=generator).float()).to(sites[0].weight.device)
    before = task.run(call)
    with kept(site.layer for site in sites):
        scale_columns(sites, s)
        if torch.equal(task.run(call), before):  # nothing is seen of them, so nothing would be proven
            return None
        for candidate in reversed(candidates):
            with kept([candidate.module]):
                candidate.divide(s)
                same = torch.equal(task.run(call), before)
            if same:
                return candidate.name
    return None


def _run_before(task: BlockTask, sites: Sequence[Site], call: Call) -> list[Producer]:
    """Modules with a weight of their own in the order in which they finish, up to the first of the sites."""
    own, found = {site.layer for site in sites}, list[Producer]()
    with ExitStack() as stack:
        for name, module in task.block.named_modules():
            weighted = isinstance(weight := module._parameters.get("weight"), Tensor) and weight.is_floating_point()
            if module in own:
                stack.callback(module.register_forward_pre_hook(stop_forward).remove)
            elif weighted and (not isinstance(module, Twin) or "weight" in module.weights()):
                producer = Producer(name, module)
                stack.callback(module.register_forward_hook(lambda *_, p=producer: found.append(p)).remove)  # type: ignore[misc]
        call_until_stopped(lambda: task.run(call))
    return list({producer.name: producer for producer in found}.values())


@torch.no_grad()
def takes_shift(task: BlockTask, sites: Sequence[Site], producer: Producer, *, generator: torch.Generator) -> bool:
    """Whether what is subtracted from a producer's output is subtracted from the input of `sites`, too, up to rounding,
    and all have biases that can make up for it. So a product with a gate is told from an attention's average.
    """
    if producer.bias is None or any(site.layer._parameters.get("bias") is None for site in sites):
        return False
    return task.share.decide(lambda: _takes_shift(task, sites, producer, generator), generator)


def _takes_shift(task: BlockTask, sites: Sequence[Site], producer: Producer, generator: torch.Generator) -> bool:
    def seen() -> Tensor:
        (((args, kwargs), _),) = seen_by(task.block, unit_of(task.block, sites[0]), task.inputs["fp"][:1])
        return next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))

    before = seen()
    by = (before.abs().max() * torch.randn(before.shape[-1], generator=generator)).to(before.dtype)
    with kept([producer.module]):
        producer.lower(by.to(producer.rows.device))
        error = (seen() - (before - by)).abs().max()
    return bool(error <= 1e-2 * by.abs().max())


@contextmanager
def kept(modules: Any) -> Iterator[None]:
    """Own parameters of some modules are afterwards what they were."""
    before = [(p, p.detach().clone()) for module in modules for p in module._parameters.values() if p is not None]
    try:
        yield
    finally:
        for parameter, value in before:
            parameter.detach().copy_(value)


@torch.no_grad()
def answers_boundedly(task: BlockTask, site: Site) -> bool:
    """Whether the module around a layer answers ever larger outputs of it with bounded ones, as a softmax does.

    So queries and keys are told from values, gates and everything else without a name. A layer alone in its module is
    none.
    """
    name = surrounding(task.block, site)
    if len(sites_of(task.block.get_submodule(name))) < 2:
        return False
    return task.share.decide(lambda: _answers_boundedly(task, site, name))


def _answers_boundedly(task: BlockTask, site: Site, name: str) -> bool:
    ((call, output),) = seen_by(task.block, name, task.inputs["fp"][:1])
    around = BlockTask(task.block.get_submodule(name), [[site]], {}, {})

    def distance(factor: float) -> float:
        with kept([site.layer]):
            for parameter in (site.layer._parameters[name] for name in (site.prefix, "bias")):
                if parameter is not None:
                    parameter.detach().mul_(factor)
            return float((around.run(call).cpu().double() - output.double()).norm())

    return not distance(2.0**11) > 1.5 * distance(2.0**10)  # an answer that grows would have doubled
