"""Learned scales in the optimizer: a parameter group of their own, without weight decay and with their own rate."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
_SCHEDULER_RATES = ("base_lrs", "_last_lr", "min_lrs")


def separate_scales(
    optimizers: Sequence[Optimizer], schedulers: Iterable[Any], scales: Sequence[nn.Parameter], *, rate: float
) -> None:
    """Move `scales` into groups of their own, in place; scales that no optimizer has join the first one.

    A group that holds scales is split in two: the scales' half inherits every option, with weight decay 0 and learning
    rates (also those that schedulers keep per group) times `rate`.

    Args:
        optimizers: The optimizers of the run, before their states are restored.
        schedulers: Their learning rate schedulers.
        scales: The learned scales.
        rate: Learning rate of the scales in units of the group's.
    """
    schedulers = list(schedulers)
    wanted = {id(scale) for scale in scales}
    for optimizer in optimizers:
        for index, group in enumerate(list(optimizer.param_groups)):
            mine = [p for p in group["params"] if id(p) in wanted]
            if mine:
                wanted -= {id(p) for p in mine}
                group["params"] = [p for p in group["params"] if all(p is not q for q in mine)]
                _add_group(optimizer, schedulers, index, mine, rate)
    missing = [scale for scale in scales if id(scale) in wanted]
    if missing and optimizers:
        _add_group(optimizers[0], schedulers, 0, missing, rate)


def _add_group(optimizer: Optimizer, schedulers: list[Any], like: int, params: list[nn.Parameter], rate: float) -> None:
    options = {name: value for name, value in optimizer.param_groups[like].items() if name != "params"}
    options |= {name: options[name] * rate for name in _RATES if isinstance(options.get(name), int | float)}
    if "weight_decay" in options:
        options["weight_decay"] = 0.0
    optimizer.add_param_group({**options, "params": params})
    for scheduler in schedulers:
        if scheduler.optimizer is optimizer:
            _follow(scheduler, like, rate)


def _follow(scheduler: Any, like: int, rate: float) -> None:
    """Give a scheduler's per-group lists an entry for the new group."""
    for child in getattr(scheduler, "_schedulers", []):
        _follow(child, like, rate)
    for name in (*_SCHEDULER_RATES, "lr_lambdas"):
        values = getattr(scheduler, name, None)
        if isinstance(values, list) and like < len(values):
            values.append(values[like] * rate if name in _SCHEDULER_RATES else values[like])


def forget(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Zero what optimizers remember of parameters that are given new values (moments, step counts)."""
    wanted = {id(p) for p in parameters}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            if id(parameter) in wanted:
                for value in state.values():
                    if hasattr(value, "zero_"):
                        value.zero_()
