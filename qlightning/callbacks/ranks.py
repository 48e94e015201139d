"""What every process of a run has of its own, so that a checkpoint holds it for all of them.

A checkpoint holds one copy of the module. Random numbers differ from process to process, and so does what static scales
have observed until it is pooled.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from qlightning.callbacks.phases import places
from qlightning.evaluation.random_state import random_state, restore_random_state
from qlightning.numerics.learned import Static

Observed = dict[str, dict[str, Tensor]]


def sum_over(trainer: Trainer) -> Callable[[Tensor], Tensor]:
    """Sums a tensor over the processes of a run."""

    def reduce(tensor: Tensor) -> Tensor:
        reduced: Tensor = trainer.strategy.reduce(tensor, reduce_op="sum")  # type: ignore[assignment]
        return reduced

    return reduce


def from_all(trainer: Trainer, value: Any) -> list[Any]:
    """What each process has here, to be called in all of them."""
    of: list[Any] = [value] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(of, value)
    return of


def own_states(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Plain data, to be called in all processes: what each has of its own, and what they observed together."""
    if trainer.world_size == 1:
        return {"of": [{"random": random_state()}]}
    observing = _observing(pl_module)
    mine = {"random": random_state(), "observed": _observed(observing)}
    of = from_all(trainer, mine)
    for scale in observing.values():
        scale.merge(sum_over(trainer))
    pooled = _observed(observing)
    _observe_again(observing, mine["observed"])
    return {"of": of, "pooled": pooled}


def restore_own(states: Mapping[str, Any], trainer: Trainer, pl_module: LightningModule) -> None:
    """The inverse of `own_states`; with another number of processes random numbers begin anew."""
    of, here = states["of"], trainer.world_size
    if len(of) == here:
        restore_random_state(of[trainer.global_rank]["random"])
    else:
        rank_zero_info(f"QATCallback: resumed on {here} processes from {len(of)}: random numbers begin anew")
    if len(of) == here == 1:
        return
    observing = _observing(pl_module)
    if len(of) == here:
        _observe_again(observing, of[trainer.global_rank]["observed"])
        return
    _observe_again(observing, states.get("pooled", {}))  # one process saved what the module itself holds
    for scale in observing.values():
        if trainer.is_global_zero:
            scale.merge(lambda tensor: tensor * (here / len(of)))  # a step is to count as much as those that follow
        else:
            scale.reset()


def _observing(module: nn.Module) -> dict[str, Static]:
    """Static scales of activations that gather what each process sees."""
    return {
        place.name: scale
        for place in places(module)
        if place.observes
        and isinstance(scale := place.quantizer.scale, Static)
        and not (place.quantizer.enabled and scale.follows)
    }


def _observed(scales: Mapping[str, Static]) -> Observed:
    return {name: {key: value.cpu().clone() for key, value in s.named_buffers()} for name, s in scales.items()}


def _observe_again(scales: Mapping[str, Static], observed: Observed) -> None:
    for name, values in observed.items():
        for key, buffer in scales[name].named_buffers() if name in scales else ():
            buffer.copy_(values[key])
