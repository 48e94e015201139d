"""Modules inside a block, as solvers find them around a quantized weight: their names, and what they get and return."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from qlightning.capture import Call, Site, call_until_stopped, device_of, fetched, stop_forward, stored
from qlightning.evaluation.modes import quantizers_off
from qlightning.solvers.solver import main_output


def unit_of(block: nn.Module, site: Site) -> str:
    """Name in the block of a site's layer, or of the PEFT layer around it."""
    name = next(name for name, child in block.named_modules() if child is site.layer)
    wrapped = name == "base_layer" or name.endswith(".base_layer")
    return name.removesuffix("base_layer").removesuffix(".") if wrapped else name


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


def seen_by(block: nn.Module, name: str, calls: Sequence[Call]) -> list[tuple[Call, Tensor]]:
    """What a module of the block gets, and its main output, as the block is now, on the CPU.

    Args:
        block: The block, which is run on each call up to the end of the module.
        name: The module's name in it; "" is the block.
        calls: Stored arguments of the block.
    """
    unit, device, found, outputs = block.get_submodule(name), device_of(block), list[Call](), list[Tensor]()

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(stored((args, kwargs), found[-1] if found else None))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(stored(main_output(output)))
        stop_forward()

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.callback(unit.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(unit.register_forward_hook(after).remove)
        for call in calls:
            args, kwargs = fetched(call, device)
            call_until_stopped(lambda args=args, kwargs=kwargs: block(*args, **kwargs))  # type: ignore[misc]
    return list(zip(found, outputs, strict=True))


class Before:
    """A block as it was when this was made, its quantizers off: `with before(): ...`, and as it is now afterwards.

    Values come and go, not modules: a copy of a module that FSDP2 manages cannot be made.

    Args:
        block: The block.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block, self._values = block, _values(block)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        now = _values(self.block)
        with quantizers_off(self.block), torch.no_grad():
            _write(self._values)
            try:
                yield
            finally:
                _write(now)


def _values(block: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [(parameter, parameter.detach().clone()) for parameter in block.parameters()]


def _write(values: Sequence[tuple[Tensor, Tensor]]) -> None:
    for parameter, value in values:
        parameter.copy_(value)
