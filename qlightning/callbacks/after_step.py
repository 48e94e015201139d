"""The moment after an optimizer has stepped.

Lightning has no hook for it: `on_train_batch_end` also follows batches that only accumulate gradients. The optimizer's
own hook fires once per real step, not where a GradScaler skips one. `trainer.global_step` is not yet raised in it.
"""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from torch.optim import Optimizer


class AfterStep:
    """Calls a function after each step of each optimizer of a run."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def attach(self, trainer: Trainer, act: Callable[[Optimizer], None]) -> None:
        """From now on, in the place of what was attached before.

        Args:
            trainer: Whose optimizers.
            act: What is called, with the optimizer that stepped.
        """
        self.detach()

        def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            act(optimizer)

        self._handles = [optimizer.register_step_post_hook(stepped) for optimizer in trainer.optimizers]

    def detach(self) -> None:
        """Until it is attached again; nothing where it was not."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
