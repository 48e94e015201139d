"""The moment after an optimizer has stepped.

Lightning has no hook for it: `on_train_batch_end` also follows batches that only accumulate gradients. The optimizer's
own hook fires once per real step, not where a GradScaler skips one. `trainer.global_step` is not yet raised in it.
"""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from torch.optim import Optimizer


class AfterStep:
    """Calls a function after each step of each optimizer of a run.

    Args:
        act: What is called, with the optimizer that stepped.
    """

    def __init__(self, act: Callable[[Optimizer], None]) -> None:
        self._act = act
        self._handles: list[Any] = []

    def attach(self, trainer: Trainer) -> None:
        self.detach()
        self._handles = [optimizer.register_step_post_hook(self._stepped) for optimizer in trainer.optimizers]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._act(optimizer)
