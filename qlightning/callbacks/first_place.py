"""Where a step leaves the finite numbers, found by running it once more and looking at every module."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qlightning.callbacks.ranks import from_all
from qlightning.evaluation.modes import not_observing, silent
from qlightning.evaluation.random_state import random_state, restore_random_state
from qlightning.layers.coverage import public_name


def first_place(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> str:
    """A sentence on the first module that gives what is not finite, or is given it; "" where all is finite.

    To be called in every process. Random numbers are not those of the step, so dropout may hide it.

    Args:
        trainer: The run.
        module: Its module, not stepped since.
        batch: The batch of this process.
        batch_idx: Its number.
    """
    arguments = trainer.fit_loop.epoch_loop._build_kwargs({}, batch, batch_idx)  # type: ignore[arg-type]
    random = random_state()
    try:
        with ExitStack() as stack:
            for context in (silent(module), torch.no_grad(), not_observing(module)):
                stack.enter_context(context)
            stack.enter_context(trainer.precision_plugin.train_step_context())
            found = stack.enter_context(_watched(module))
            trainer.strategy.training_step(*arguments.values())
    finally:
        restore_random_state(random)
    everywhere = [(number, said[0]) for number, said in enumerate(from_all(trainer, found)) if said]
    if not everywhere:
        return ""
    number, said = everywhere[0]
    alone = len(everywhere) < trainer.world_size
    return f"Run once more, it begins {said}{f', in process {number}' if alone else ''}"


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[str]]:
    """Around a forward pass: what is said of each module that is given or gives what is not finite, in order."""
    found: list[str] = []
    handles: list[Any] = []
    for name, child in module.named_modules():
        if child is not module:
            called = public_name(name)
            handles += [
                child.register_forward_pre_hook(_before(called, found), with_kwargs=True),
                child.register_forward_hook(_after(called, found)),
            ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _before(name: str, found: list[str]) -> Any:
    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        values = [value for value in tree_leaves((args, kwargs)) if _is_float(value)]
        if any(bool((value.isnan() | value.isposinf()).any()) for value in values):  # masks hold minus infinity
            found.append(f"before {name}, whose input is not finite")

    return look


def _after(name: str, found: list[str]) -> Any:
    def look(module: nn.Module, args: Any, output: Any) -> None:
        values = [value for value in tree_leaves(output) if _is_float(value)]
        if not all(bool(value.isfinite().all()) for value in values):
            found.append(f"in {name}, whose output is not finite")

    return look


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
