"""What happens to a step that is not finite: an error, no step, or a step back."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, StochasticWeightAveraging, Timer, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from qlightning.callbacks.qat import QATCallback

_ADVICE = "take a smaller learning rate, clip gradients, Trainer(gradient_clip_val=1.0), or start quantization later"


class Before(NamedTuple):
    """What was, before a step's first batch, of all that does not wait for the optimizer's step to change.

    Attributes:
        buffers: Copies of the module's buffers.
        rates: Learning rates of the optimizers' groups.
    """

    buffers: dict[str, Tensor]
    rates: list[list[Any]]

    @classmethod
    def of(cls, trainer: Trainer, module: LightningModule) -> "Before":
        rates = [[copy.deepcopy(group.get("lr")) for group in o.param_groups] for o in trainer.optimizers]
        return cls({name: buffer.clone() for name, buffer in module.named_buffers()}, rates)

    @torch.no_grad()
    def put_back(self, module: LightningModule) -> None:
        for name, buffer in module.named_buffers():
            if name in self.buffers and self.buffers[name].shape == buffer.shape:
                buffer.copy_(self.buffers[name])


class Policy(ABC):
    """What FiniteCallback does about a step whose loss, gradients or scales are not finite.

    Every policy keeps the step from the weights, the optimizer's memory and the module's buffers. As under a
    GradScaler, a step that was left out counts: `trainer.global_step`, schedules and phases move on.
    """

    @abstractmethod
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Training begins, or goes on from a checkpoint."""

    @abstractmethod
    def good(self, trainer: Trainer, module: LightningModule, before: Before) -> None:
        """All is finite, and the optimizer has not stepped yet.

        Args:
            trainer: The run.
            module: Its module.
            before: What the step's batches have changed already, or a schedule changes while the optimizer steps.
        """

    @abstractmethod
    def bad(self, story: str) -> None:
        """Something is not, and the step will be left out, unless this raises ValueError."""

    @abstractmethod
    def left_out(self, trainer: Trainer, module: LightningModule) -> None:
        """The end of the batch whose step was left out."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""


class Raise(Policy):
    """The run ends with an error that names the layers."""

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        pass

    def good(self, trainer: Trainer, module: LightningModule, before: Before) -> None:
        pass

    def bad(self, story: str) -> None:
        raise ValueError(f"{story}; {_ADVICE}, or leave such steps out, FiniteCallback(SkipStep())")

    def left_out(self, trainer: Trainer, module: LightningModule) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class SkipStep(Policy):
    """The step is left out, as if its batches had not been there.

    Args:
        patience: So many steps in a row may be left out; one more is an error.
    """

    def __init__(self, patience: int = 10) -> None:
        if patience < 1:
            raise ValueError(f"patience={patience}: at least one step, for example SkipStep(patience=10)")
        self.patience = patience
        self._row = 0

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        pass

    def good(self, trainer: Trainer, module: LightningModule, before: Before) -> None:
        self._row = 0

    def bad(self, story: str) -> None:
        self._row += 1
        if self._row > self.patience:
            raise ValueError(f"{story}, and in the {self.patience} steps before; {_ADVICE}")
        rank_zero_warn(f"FiniteCallback: left out {story}")

    def left_out(self, trainer: Trainer, module: LightningModule) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"row": self._row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._row = state["row"]


class RestoreLastGood(Policy):
    """The run goes back to the last step that was kept, and on from there with the data that comes next.

    Weights, optimizers, schedules, phases, the states of callbacks and `trainer.global_step` are those of that step;
    the data is not shown again, since it would lead to the same place. Learning rate schedules by epoch go on.

    The kept step is a copy in memory, as large as a checkpoint. A run that was resumed keeps its first good step.

    Args:
        every: Steps between copies.
        retries: How often the run may go back to one and the same step; once more is an error.
    """

    def __init__(self, every: int = 100, retries: int = 3) -> None:
        if every < 1 or retries < 1:
            raise ValueError(f"every={every}, retries={retries}: at least 1, for example RestoreLastGood(every=100)")
        self.every, self.retries = every, retries
        self._kept: dict[str, Any] = {}
        self._tried = 0

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._kept = {}
        if trainer.world_size > 1 or not module.automatic_optimization:
            raise ValueError("RestoreLastGood() is for one process and automatic optimization; write SkipStep()")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                raise ValueError(
                    f"RestoreLastGood() does not take back the average of {type(callback).__name__}; write SkipStep()"
                )

    def good(self, trainer: Trainer, module: LightningModule, before: Before) -> None:
        if self._kept and trainer.global_step < self._kept["step"] + self.every:
            return
        if self._kept:
            self._tried = 0
        state = {name: before.buffers.get(name, value) for name, value in module.state_dict().items()}
        self._kept = copy.deepcopy(
            {
                "step": trainer.global_step,
                "module": {name: _plain(value) for name, value in state.items()},
                "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
                "rates": before.rates,
                "schedulers": [config.scheduler.state_dict() for config in _by_step(trainer)],
                "callbacks": {name: callback.state_dict() for name, callback in _callbacks(trainer).items()},
                "progress": trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.state_dict(),
                "batches": trainer.fit_loop.epoch_loop._batches_that_stepped,
            }
        )

    def bad(self, story: str) -> None:
        self._tried += 1
        if not self._kept:
            raise ValueError(f"{story}, before any step was good; {_ADVICE}")
        if self._tried > self.retries:
            raise ValueError(f"{story}, {self.retries} times after going back to step {self._kept['step']}; {_ADVICE}")
        rank_zero_warn(f"FiniteCallback: back to step {self._kept['step']} from {story}")

    def left_out(self, trainer: Trainer, module: LightningModule) -> None:
        kept = copy.deepcopy(self._kept)
        module.load_state_dict(kept["module"])
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
                callback.phases.rewind(kept["step"])
        loop = trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.load_state_dict(kept["progress"])
        steps = loop.automatic_optimization.optim_progress.optimizer.step
        steps.total.ready, steps.current.ready = steps.total.completed, steps.current.completed
        loop._batches_that_stepped = kept["batches"] - 1  # Lightning counts this batch in a moment

    def state_dict(self) -> dict[str, Any]:
        return {"tried": self._tried}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._tried = state["tried"]


def _by_step(trainer: Trainer) -> list[Any]:
    return [config for config in trainer.lr_scheduler_configs if config.interval == "step"]


def _callbacks(trainer: Trainer) -> dict[str, Callback]:
    """Those that go back with the run: files stay written, and time stays spent."""
    from qlightning.callbacks.finite import FiniteCallback

    every: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    apart = Checkpoint | Timer | FiniteCallback
    return {f"{i} {c.state_key}": c for i, c in enumerate(every) if not isinstance(c, apart)}


def _plain(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
