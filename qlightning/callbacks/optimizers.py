"""Learned scales in the optimizer: a parameter group of their own, without weight decay and with their own rate."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

SCALES = "learned_scales"
"""The option that marks a group as made here: optimizers that a module gives to a second fit are left as they are."""

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
_SCHEDULER_RATES = ("base_lrs", "_last_lr", "min_lrs", "max_lrs")


def separate_scales(
    optimizers: Sequence[Optimizer],
    schedulers: Iterable[Any],
    scales: Mapping[nn.Parameter, Sequence[nn.Parameter]],
    *,
    rate: float,
) -> None:
    """Move `scales` into groups of their own, in place; scales that no optimizer has join their layer's.

    A group that holds scales is split in two: the scales' half inherits every option, with weight decay 0 and learning
    rates (also those that schedulers keep per group) times `rate`.

    Args:
        optimizers: The optimizers of the run, before their states are restored.
        schedulers: Their learning rate schedulers.
        scales: The learned scales, each with the other parameters of its layer.
        rate: Learning rate of the scales in units of the group's.
    """
    groups = [(optimizer, index) for optimizer in optimizers for index in range(len(optimizer.param_groups))]
    if not groups:  # Lightning's stand-in for no optimizer has none
        return
    home = {p: place for place in groups for p in place[0].param_groups[place[1]]["params"]}
    moving: dict[tuple[Optimizer, int], list[nn.Parameter]] = {}
    for scale, layer in scales.items():
        place = home.get(scale) or next((home[p] for p in layer if p in home), groups[0])
        if SCALES not in place[0].param_groups[place[1]]:
            moving.setdefault(place, []).append(scale)
    schedulers = list(schedulers)
    for (optimizer, index), mine in moving.items():
        group = optimizer.param_groups[index]
        group["params"] = [p for p in group["params"] if p not in scales]
        _add_group(optimizer, schedulers, index, mine, rate)


def _add_group(optimizer: Optimizer, schedulers: list[Any], like: int, params: list[nn.Parameter], rate: float) -> None:
    options = {name: value for name, value in optimizer.param_groups[like].items() if name != "params"}
    options |= {name: options[name] * rate for name in _RATES if isinstance(options.get(name), int | float | Tensor)}
    if "weight_decay" in options:
        options["weight_decay"] = 0.0
    optimizer.add_param_group({**options, SCALES: True, "params": params})
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


class Memory:
    """What optimizers remember of parameters: moments, step counts.

    Made before the first step, because some optimizers (Adagrad) prepare their state when they are built.

    Args:
        optimizers: The optimizers of the run.
        parameters: Parameters that may be given new values during the run.
    """

    def __init__(self, optimizers: Sequence[Optimizer], parameters: Iterable[nn.Parameter]) -> None:
        self._optimizers = optimizers
        stepped = {p for optimizer in optimizers for g in optimizer.param_groups if SCALES in g for p in g["params"]}
        fresh = [p for p in parameters if p not in stepped]
        self._prepared = [
            {p: copy.deepcopy(optimizer.state[p]) for p in fresh if p in optimizer.state} for optimizer in optimizers
        ]

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let the optimizers begin anew with `parameters`."""
        parameters = list(parameters)
        for optimizer, prepared in zip(self._optimizers, self._prepared, strict=True):
            for parameter in parameters:
                optimizer.state.pop(parameter, None)
                if parameter in prepared:
                    optimizer.state[parameter] = copy.deepcopy(prepared[parameter])


class Rates:
    """Multiplies learning rates while an optimizer steps; at all other times they are what schedulers made them.

    Args:
        optimizers: The optimizers of the run.
        rate: The factor at this moment, for learned scales (True) or for everything else (False).

    Raises:
        ValueError: An optimizer has no learning rate to multiply.
    """

    def __init__(self, optimizers: Sequence[Optimizer], rate: Callable[[bool], float]) -> None:
        self._rate = rate
        self._own: dict[Optimizer, list[Any]] = {}
        self._depth: dict[Optimizer, int] = {}
        self._hooks: list[Any] = []
        for optimizer in optimizers:
            if any(group.get("lr") is None for group in optimizer.param_groups):
                raise ValueError(
                    f"{type(optimizer).__name__} sets its learning rate itself, so no phase can multiply it: leave lr "
                    "and scale_lr out of the schedule, or give the optimizer a learning rate"
                )
            self._hooks += [
                optimizer.register_step_pre_hook(lambda optimizer, *_: self._multiply(optimizer)),
                optimizer.register_step_post_hook(lambda optimizer, *_: self._step_done(optimizer)),
            ]

    def _multiply(self, optimizer: Optimizer) -> None:
        self._depth[optimizer] = self._depth.get(optimizer, 0) + 1
        if self._depth[optimizer] > 1:  # a class whose step calls that of its parent comes here twice
            return
        self._own[optimizer] = [_copied(group["lr"]) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            _set_rate(group, group["lr"] * self._rate(SCALES in group))

    def _step_done(self, optimizer: Optimizer) -> None:
        self._depth[optimizer] -= 1
        if not self._depth[optimizer]:
            self._put_back(optimizer)

    def _put_back(self, optimizer: Optimizer) -> None:
        for group, own in zip(optimizer.param_groups, self._own.pop(optimizer), strict=True):
            _set_rate(group, own)

    def restore(self) -> None:
        """After an error in the middle of a step: what a checkpoint written now must hold."""
        for optimizer in list(self._own):
            self._put_back(optimizer)
        self._depth.clear()

    def remove(self) -> None:
        """Let go of the optimizers, which may serve another fit."""
        self.restore()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _copied(rate: Any) -> Any:
    return rate.clone() if isinstance(rate, Tensor) else rate


def _set_rate(group: dict[str, Any], rate: Any) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(rate)  # in place: captured and compiled optimizers have read its address
    else:
        group["lr"] = rate
