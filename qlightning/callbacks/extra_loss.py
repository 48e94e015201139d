"""Terms that callbacks put into the loss of any LightningModule, without touching its code.

One wrapper stands around `training_step`, however many callbacks add terms. The loss that is trained is

    task_weight * (what training_step returns) + sum over callbacks of weight * loss

whatever the order of the callbacks: one that leaves the task's loss out (`task_weight=0`) leaves the others' terms in.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor


def loss_in(outputs: Any) -> Any:
    """The loss in what a training step returns: the thing itself, or what a mapping has under "loss"; None: no loss."""
    return outputs.get("loss") if isinstance(outputs, Mapping) else outputs


class ExtraLoss(Callback, ABC):
    """A callback that adds a term to the loss of every training step.

    Args:
        weight: What its loss is multiplied by.
        name: Under which its loss is logged, before that weight; each callback of a run needs its own.
        task_weight: What the task's own loss is multiplied by; None where the callback has nothing to say about it.
    """

    def __init__(self, *, weight: float, name: str, task_weight: float | None = None) -> None:
        if not weight > 0:
            raise ValueError(f"weight={weight}: above 0, for example weight=1.0; or leave the callback out")
        if task_weight is not None and not task_weight >= 0:
            raise ValueError(f"task_weight={task_weight}: write 1.0 to add to the task's loss, or 0.0 to replace it")
        self.weight, self.name, self.task_weight = weight, name, task_weight

    @abstractmethod
    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what is needed in the complete module, before the first step. Raises ValueError if it is not there."""

    @abstractmethod
    def watch(
        self, trainer: Trainer, pl_module: LightningModule, arguments: tuple[Any, ...], options: Mapping[str, Any]
    ) -> AbstractContextManager[Callable[[], Tensor]]:
        """Stand around one call of `training_step`; what it gives is asked for the loss afterwards.

        Args:
            trainer: The running Trainer.
            pl_module: Its module.
            arguments: What the step is called with.
            options: What it is called with by name.
        """

    @abstractmethod
    def release(self) -> None:
        """Let go of what `prepare` found: the fit is over."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check(trainer, pl_module, self)
        self.prepare(trainer, pl_module)
        total = _total_of(pl_module)
        if total is None:
            total = _Total(trainer, pl_module)
        total.callbacks.append(self)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave(pl_module)  # Lightning leaves teardown out then

    def _leave(self, pl_module: LightningModule) -> None:
        total = _total_of(pl_module)
        if total is not None and self in total.callbacks:
            total.callbacks.remove(self)
            if not total.callbacks:
                total.remove()
        self.release()


class _Total:
    """The loss of one module's training step: the task's and what callbacks add."""

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trainer, self.module = trainer, pl_module
        self.callbacks: list[ExtraLoss] = []
        self._replaced = vars(pl_module).get("training_step")  # what torch.compile or a user has put on the instance
        self.own = pl_module.training_step

        @functools.wraps(self.own)  # Lightning looks at the signature
        def training_step(*arguments: Any, **options: Any) -> Any:
            return self.step(arguments, options)

        training_step.total = self  # type: ignore[attr-defined]
        pl_module.training_step = training_step  # type: ignore[method-assign]

    def remove(self) -> None:
        """Give the module its own step back."""
        del self.module.training_step
        if self._replaced is not None:
            self.module.training_step = self._replaced  # type: ignore[method-assign]

    def step(self, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        """The training step with all terms."""
        with ExitStack() as stack:
            watched = [
                (callback, stack.enter_context(callback.watch(self.trainer, self.module, arguments, options)))
                for callback in self.callbacks
            ]
            outputs = self.own(*arguments, **options)
        task = loss_in(outputs)
        if not isinstance(task, Tensor):  # a skipped step, or one that Lightning will refuse
            return outputs
        weight = next((c.task_weight for c in self.callbacks if c.task_weight is not None), 1.0)
        terms = [task if weight == 1 else task * weight] if weight else []
        for callback, loss in watched:
            value = loss()
            self.module.log(callback.name, value.detach())
            terms.append(value * callback.weight)
        total = functools.reduce(lambda a, b: a + b, terms)
        return {**outputs, "loss": total} if isinstance(outputs, Mapping) else total


def own_step(pl_module: LightningModule) -> Callable[..., Any]:
    """The module's training step without what callbacks add to its loss."""
    total = _total_of(pl_module)
    return pl_module.training_step if total is None else total.own


def _total_of(pl_module: LightningModule) -> _Total | None:
    return getattr(vars(pl_module).get("training_step"), "total", None)


def _check(trainer: Trainer, pl_module: LightningModule, new: ExtraLoss) -> None:
    kind = type(new).__name__
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"{type(pl_module).__name__} optimizes by hand, so no callback can add to its loss: leave {kind} out and "
            "add the loss there, for example self.manual_backward(loss + qlightning.losses.KL()(student, teacher))"
        )
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            f"{type(pl_module).__name__}.training_step fetches its batches itself: {kind} needs "
            "training_step(self, batch, batch_idx)"
        )
    others = [other for other in trainer.callbacks if isinstance(other, ExtraLoss) and other is not new]  # type: ignore[attr-defined]
    for other in others:
        if other.name == new.name:
            raise ValueError(
                f"two callbacks log their loss as {new.name!r}: give one another name, {kind}(..., name='{new.name}_2')"
            )
        if None not in (other.task_weight, new.task_weight) and other.task_weight != new.task_weight:
            raise ValueError(
                f"{new.name} weighs the task's loss with task_weight={new.task_weight} and {other.name} with "
                f"task_weight={other.task_weight}: write the same in both"
            )
