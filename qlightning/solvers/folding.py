"""Folding: a scale of a weight's input channels goes into whatever produces this input, and the function stays.

Which module that is, no architecture has to say. A candidate is a module that runs before the layer and has as many
output channels as the layer has inputs; it is the producer if scaling the layer's columns by powers of two and its own
rows by their inverses leaves the block's output as it was, bit for bit. Powers of two are exact in floating point, so
whatever lies between (an attention's average over tokens, a product with a gate, a ReLU) passes just when it passes a
scale of each channel; a GELU, a softmax or a second reader of the same input does not.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlightning.capture import Call, Site, call_until_stopped, sites_of, stop_forward, stored
from qlightning.layers.layer import Twin
from qlightning.solvers.apiq import unit_of
from qlightning.solvers.moments import write
from qlightning.solvers.solver import BlockTask, main_output


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

    def divide(self, s: Tensor) -> None:
        """Divide what it produces by a scale (output channels,), in place."""
        rows = self.rows
        divided = (rows.float() / s.view(-1, *(1,) * (rows.dim() - 1))).to(rows.dtype)
        if isinstance(self.module, Twin):
            write(Site(self.name, self.module, "weight"), divided)
        else:
            rows.copy_(divided)
        if (bias := self.module._parameters.get("bias")) is not None:
            bias.detach().copy_((bias.detach().float() / s).to(bias.dtype))


@torch.no_grad()
def scale_columns(sites: Sequence[Site], s: Tensor) -> None:
    """Multiply the input channels of weights by a scale (fan-in,), in place."""
    for site in sites:
        weight = site.weight
        write(site, (weight.float() * s).to(weight.dtype))


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
    call, features = task.inputs["fp"][0], sites[0].weight.shape[1]
    candidates = [c for c in _run_before(task, sites, call) if len(c.rows) == features]
    if not candidates:
        return None
    s = torch.exp2(torch.randint(-1, 2, (features,), generator=generator).float()).to(sites[0].weight.device)
    before = task.run(call)
    with _kept(site.layer for site in sites):
        scale_columns(sites, s)
        if torch.equal(task.run(call), before):  # nothing is seen of them, so nothing would be proven
            return None
        for candidate in reversed(candidates):
            with _kept([candidate.module]):
                candidate.divide(s)
                same = torch.equal(task.run(call), before)
            if same:
                return candidate
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


@contextmanager
def _kept(modules: Any) -> Iterator[None]:
    """The modules' own parameters are afterwards what they were."""
    before = [(p, p.detach().clone()) for module in modules for p in module._parameters.values() if p is not None]
    try:
        yield
    finally:
        for parameter, value in before:
            parameter.detach().copy_(value)


# --- what stands around a layer ---


def enclosing(block: nn.Module, sites: Sequence[Site]) -> str:
    """Name in the block of the smallest module with a call of its own that holds all of some sites."""
    units = [unit_of(block, site).split(".") for site in sites]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*units, strict=False))
    return _called(block, [parts[0] for parts in shared])


def surrounding(block: nn.Module, site: Site) -> str:
    """Name in the block of the next larger module with a call of its own."""
    return _called(block, unit_of(block, site).split(".")[:-1])


def _called(block: nn.Module, path: list[str]) -> str:
    while path and isinstance(block.get_submodule(".".join(path)), nn.ModuleList | nn.ModuleDict):
        path = path[:-1]
    return ".".join(path)


def seen_by(task: BlockTask, name: str, *, batches: int | None = None) -> list[tuple[Call, Tensor]]:
    """What a module of the block gets and returns on the float stream, as the block's weights are now, on the CPU."""
    unit, calls, outputs = task.block.get_submodule(name), list[Call](), list[Tensor]()

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(stored((args, kwargs), calls[-1] if calls else None))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(stored(main_output(output)))
        stop_forward()

    with ExitStack() as stack:
        stack.callback(unit.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(unit.register_forward_hook(after).remove)
        for call in task.inputs["fp"][:batches]:
            call_until_stopped(lambda call=call: task.run(call))  # type: ignore[misc]
    return list(zip(calls, outputs, strict=True))


@torch.no_grad()
def answers_boundedly(task: BlockTask, site: Site) -> bool:
    """Whether the module around a layer answers ever larger outputs of it with bounded ones, as a softmax does.

    So queries and keys are told from values, gates and everything else without a name. A layer alone in its module is
    none.
    """
    name = surrounding(task.block, site)
    if len(sites_of(task.block.get_submodule(name))) < 2:
        return False
    ((call, output),) = seen_by(task, name, batches=1)
    around = BlockTask(task.block.get_submodule(name), [[site]], {}, {})

    def distance(factor: float) -> float:
        with _kept([site.layer]):
            for parameter in (site.layer._parameters[name] for name in (site.prefix, "bias")):
                if parameter is not None:
                    parameter.detach().mul_(factor)
            return float((around.run(call).cpu().double() - output.double()).norm())

    return not distance(2.0**11) > 1.5 * distance(2.0**10)  # an answer that grows would have doubled
