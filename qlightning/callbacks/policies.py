"""What happens to a step that is not finite: an error, no step, or a step back."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from qlightning.callbacks.kept_step import KeptStep

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

    The kept step is a copy in memory, as large as a checkpoint; of a sharded module every process keeps its shards. A
    run that was resumed keeps its first good step.

    Args:
        every: Steps between copies.
        retries: How often the run may go back to one and the same step; once more is an error.
    """

    def __init__(self, every: int = 100, retries: int = 3) -> None:
        if every < 1 or retries < 1:
            raise ValueError(f"every={every}, retries={retries}: at least 1, for example RestoreLastGood(every=100)")
        self.every, self.retries = every, retries
        self._kept: KeptStep | None = None
        self._tried = 0

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._kept = None
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise ValueError(
                f"RestoreLastGood() does not know the shards of {type(trainer.strategy).__name__}: write SkipStep() or "
                "Trainer(strategy=QuantizedFSDP())"
            )
        if not module.automatic_optimization:
            raise ValueError("RestoreLastGood() is for automatic optimization; write SkipStep()")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                raise ValueError(
                    f"RestoreLastGood() does not take back the average of {type(callback).__name__}; write SkipStep()"
                )

    def good(self, trainer: Trainer, module: LightningModule, before: Before) -> None:
        if self._kept is not None and trainer.global_step < self._kept.step + self.every:
            return
        if self._kept is not None:
            self._tried = 0
        self._kept = KeptStep(trainer, module, buffers=before.buffers, rates=before.rates)

    def bad(self, story: str) -> None:
        self._tried += 1
        if self._kept is None:
            raise ValueError(f"{story}, before any step was good; {_ADVICE}")
        if self._tried > self.retries:
            raise ValueError(f"{story}, {self.retries} times after going back to step {self._kept.step}; {_ADVICE}")
        rank_zero_warn(f"FiniteCallback: back to step {self._kept.step} from {story}")

    def left_out(self, trainer: Trainer, module: LightningModule) -> None:
        assert self._kept is not None
        self._kept.put_back(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        return {"tried": self._tried}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._tried = state["tried"]
