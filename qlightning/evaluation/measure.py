"""Held-out metrics of a LightningModule as it is right now, from inside a running fit.

Lightning's own validation loop cannot be entered from a callback without setting off every other callback
(checkpointing, early stopping). This runs the module's own validation hooks over the Trainer's validation data and
returns what they log, and leaves no trace in the run: not in the loggers, not in the random numbers.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torchmetrics import Metric, MetricCollection

from qlightning.evaluation.modes import eval_mode, logging_to
from qlightning.evaluation.random_state import random_state, restore_random_state


def measure(trainer: Trainer, module: LightningModule, *, max_batches: int | None = None) -> dict[str, float]:
    """What `module` logs over the validation data, put together as Lightning's validation does and over all processes.

    Args:
        trainer: The running Trainer.
        module: Its module, in whatever state it is to be measured.
        max_batches: Use only so many batches of each loader; the Trainer's `limit_val_batches` holds anyway.

    Raises:
        ValueError: There is no validation data, or the module logs nothing over it.
    """
    loader = _loader(trainer, max_batches)
    several = len(loader.flattened) > 1
    step_takes_number = is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2)
    with ExitStack() as stack:
        stack.callback(restore_random_state, random_state())
        stack.enter_context(eval_mode(module))
        stack.enter_context(_without_loggers(trainer))
        logged = _Logged()
        stack.enter_context(logging_to(module, logged.log, logged.log_dict))
        stack.enter_context(torch.no_grad())
        module.on_validation_epoch_start()
        for raw, number, index in loader:
            batch = trainer.precision_plugin.convert_input(raw)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=index)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=index)
            logged.begin_batch(batch, f"/dataloader_idx_{index}" if several else "")
            with trainer.precision_plugin.val_step_context():
                module.validation_step(*(batch, number, index)[: 3 if several else 1 + step_takes_number])
        logged.begin_batch(None, "")
        module.on_validation_epoch_end()
        values = logged.values(trainer)
    if not values:
        raise ValueError(
            f"{type(module).__name__}.validation_step logs nothing; log for example self.log('val_loss', loss)"
        )
    return values


def _loader(trainer: Trainer, max_batches: int | None) -> CombinedLoader:
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.setup_data()
    if loop.skip or trainer.val_dataloaders is None:
        raise ValueError(
            "there is no validation data to measure on: give the module a validation_step and the run its data, "
            "trainer.fit(module, train_dataloaders=..., val_dataloaders=...), with limit_val_batches above 0"
        )
    loader = CombinedLoader(trainer.val_dataloaders, "sequential")
    loader.limits = [batches if max_batches is None else min(batches, max_batches) for batches in loop.max_batches]
    return loader


_REDUCTIONS: dict[str, Callable[[float, float], float]] = {
    "mean": lambda a, b: a + b,
    "sum": lambda a, b: a + b,
    "min": min,
    "max": max,
}


class _Logged:
    """What a module logs, by name, reduced as `LightningModule.log` says."""

    def __init__(self) -> None:
        self._batch: Any = None
        self._suffix = ""
        self._values: dict[str, tuple[str, float, int]] = {}
        self._metrics: dict[str, Metric] = {}

    def begin_batch(self, batch: Any, suffix: str) -> None:
        self._batch, self._suffix = batch, suffix

    def log(self, *args: Any, **kwargs: Any) -> None:
        call = inspect.signature(LightningModule.log).bind(None, *args, **kwargs)
        call.apply_defaults()
        said = call.arguments
        if said["on_epoch"] is False:
            return
        name = said["name"] + (self._suffix if said["add_dataloader_idx"] else "")
        if isinstance(said["value"], Metric):
            self._metrics[name] = said["value"]
            return
        reduction = said["reduce_fx"] if isinstance(said["reduce_fx"], str) else said["reduce_fx"].__name__
        value, size = float(said["value"]), 1
        if reduction == "mean":
            size = said["batch_size"] or (1 if self._batch is None else extract_batch_size(self._batch))
            value *= size
        if name in self._values:
            _, before, count = self._values[name]
            value, size = _REDUCTIONS[reduction](before, value), count + size
        self._values[name] = reduction, value, size

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        collection = isinstance(dictionary, MetricCollection)
        items = dictionary.items(keep_base=False, copy_state=False) if collection else dictionary.items()
        for name, value in items:
            self.log(name, value, *args, **kwargs)

    def values(self, trainer: Trainer) -> dict[str, float]:
        found = {}
        for name, (reduction, value, size) in self._values.items():
            over = "sum" if reduction == "mean" else reduction
            total = _over_processes(trainer, value, over)
            found[name] = total / _over_processes(trainer, size, "sum") if reduction == "mean" else total
        for name, metric in self._metrics.items():
            found[name] = float(metric.compute())
            metric.reset()
        return found


def _over_processes(trainer: Trainer, value: float, reduction: str) -> float:
    if trainer.world_size == 1:
        return value
    tensor = torch.tensor(value, device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(tensor, reduce_op=reduction))  # type: ignore[arg-type]


@contextmanager
def _without_loggers(trainer: Trainer) -> Iterator[None]:
    """For what a module writes to its logger itself, pictures say."""
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers
