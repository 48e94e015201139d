"""A step of a run as it was, in memory, to go back to."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, Timer
from torch import Tensor

from qlightning.callbacks.qat import QATCallback


class KeptStep:
    """What a run was before an optimizer stepped: weights, optimizers, schedules, phases, callbacks and counts.

    Every process keeps what it holds itself, of a sharded module its shards.

    Args:
        trainer: The run.
        module: Its module.
        buffers: Its buffers at the beginning of the step, by name.
        rates: Learning rates of the optimizers' groups then.

    Attributes:
        step: The step.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        *,
        buffers: Mapping[str, Tensor],
        rates: Sequence[Sequence[Any]],
    ) -> None:
        self.step = trainer.global_step
        loop = trainer.fit_loop.epoch_loop
        state = {name: buffers.get(name, value) for name, value in module.state_dict().items()}
        self._module = {name: _own(value) for name, value in state.items()}
        self._rest: dict[str, Any] = copy.deepcopy(
            {
                "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
                "rates": rates,
                "schedulers": [config.scheduler.state_dict() for config in _by_step(trainer)],
                "callbacks": {name: callback.state_dict() for name, callback in _callbacks(trainer).items()},
                "progress": loop.automatic_optimization.optim_progress.state_dict(),
                "batches": loop._batches_that_stepped,
            }
        )

    def put_back(self, trainer: Trainer, module: LightningModule) -> None:
        """Be in that step again, at the end of a batch; in every process."""
        kept = copy.deepcopy(self._rest)
        module.load_state_dict({name: _own(value) for name, value in self._module.items()})
        for optimizer, state, rates in zip(trainer.optimizers, kept["optimizers"], kept["rates"], strict=True):
            for group, rate in zip(state["param_groups"], rates, strict=True):
                group["lr"] = rate
            optimizer.load_state_dict(state)
        for config, state in zip(_by_step(trainer), kept["schedulers"], strict=True):
            config.scheduler.load_state_dict(state)
        for name, callback in _callbacks(trainer).items():
            if kept["callbacks"][name]:
                callback.load_state_dict(kept["callbacks"][name])
            if isinstance(callback, QATCallback) and callback.phases is not None:
                callback.phases.rewind(self.step)
        loop = trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.load_state_dict(kept["progress"])
        steps = loop.automatic_optimization.optim_progress.optimizer.step
        steps.total.ready, steps.current.ready = steps.total.completed, steps.current.completed
        loop._batches_that_stepped = kept["batches"] - 1  # Lightning counts this batch in a moment


def _own(value: Any) -> Any:
    """A copy: of a shard without what a strategy has hung on it, which a deep copy would copy, too."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _by_step(trainer: Trainer) -> list[Any]:
    return [config for config in trainer.lr_scheduler_configs if config.interval == "step"]


def _callbacks(trainer: Trainer) -> dict[str, Callback]:
    """Those that go back with the run: files stay written, and time stays spent."""
    from qlightning.callbacks.finite import FiniteCallback

    every: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    apart = Checkpoint | Timer | FiniteCallback
    return {f"{i} {c.state_key}": c for i, c in enumerate(every) if not isinstance(c, apart)}
