"""Held-out metrics of a LightningModule as it is right now, from inside a running fit.

Lightning's own validation loop cannot be entered from a callback without setting off every other callback
(checkpointing, early stopping). This runs the module's own validation hooks over the Trainer's validation data and
returns what they log, and leaves no trace in the run: not in the loggers, not in the random numbers.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torchmetrics import Metric

from qlightning.evaluation.random_state import random_state, restore_random_state


def measure(trainer: Trainer, module: LightningModule, *, max_batches: int | None = None) -> dict[str, float]:
    """What `module` logs over the validation data: means over batches weighted by batch size, metrics computed once.

    Args:
        trainer: The running Trainer.
        module: Its module, in whatever state it is to be measured.
        max_batches: Use only so many batches of each loader.

    Raises:
        ValueError: There is no validation data, or the module logs nothing over it.
    """
    loaders = _loaders(trainer)
    if not loaders:
        raise ValueError("there is no validation data to measure on: pass val_dataloaders=... to fit")
    random = random_state()
    with ExitStack() as stack:
        stack.enter_context(_eval_mode(module))
        logged = stack.enter_context(_captured_log(module))
        stack.enter_context(torch.no_grad())
        module.on_validation_epoch_start()
        for index, loader in enumerate(loaders):
            for number, raw in enumerate(loader):
                if number == max_batches:
                    break
                batch = trainer.strategy.batch_to_device(raw)
                with trainer.precision_plugin.val_step_context():
                    module.validation_step(*((batch, number) if len(loaders) == 1 else (batch, number, index)))
                logged.end_batch(_size(batch))
        module.on_validation_epoch_end()
        logged.end_batch(1)
        values = logged.values()
    restore_random_state(random)
    if not values:
        raise ValueError(
            f"{type(module).__name__}.validation_step logs nothing; log for example self.log('val_loss', loss)"
        )
    return values


def _loaders(trainer: Trainer) -> list[Any]:
    if trainer.val_dataloaders is None:
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
    loaders: Any = trainer.val_dataloaders
    return [] if loaders is None else list(loaders) if isinstance(loaders, list | tuple) else [loaders]


def _size(batch: Any) -> int:
    """The first dimension of the first tensor in a batch."""
    if isinstance(batch, torch.Tensor):
        return int(batch.shape[0]) if batch.dim() else 1
    inner = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else ()
    return next((_size(item) for item in inner), 1)


class _Logged:
    """What a module logs, by name."""

    def __init__(self) -> None:
        self._pending: dict[str, Any] = {}
        self._sums: dict[str, tuple[float, int]] = {}
        self._metrics: dict[str, Metric] = {}

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self._pending[name] = value

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in dictionary.items():
            self.log(name, value)

    def end_batch(self, size: int) -> None:
        for name, value in self._pending.items():
            if isinstance(value, Metric):
                self._metrics[name] = value
            else:
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = total + float(value) * size, count + size
        self._pending.clear()

    def values(self) -> dict[str, float]:
        means = {name: total / count for name, (total, count) in self._sums.items()}
        for name, metric in self._metrics.items():
            means[name] = float(metric.compute())
            metric.reset()
        return means


@contextmanager
def _captured_log(module: LightningModule) -> Iterator[_Logged]:
    logged = _Logged()
    module.log, module.log_dict = logged.log, logged.log_dict  # type: ignore[method-assign, assignment]
    try:
        yield logged
    finally:
        del module.log, module.log_dict


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode
