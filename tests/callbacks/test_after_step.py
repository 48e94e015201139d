"""The moment after the step: once per optimizer step, also when gradients accumulate, and never after the run."""

from lightning.pytorch import Callback

from qlightning.callbacks.after_step import AfterStep


class Count(Callback):
    def __init__(self) -> None:
        self.steps, self.batches = [], 0

    def on_train_start(self, trainer, pl_module) -> None:
        self.after = AfterStep()
        for _ in range(2):  # does not count twice
            self.after.attach(trainer, lambda optimizer: self.steps.append(trainer.global_step))

    def on_train_batch_end(self, *args) -> None:
        self.batches += 1

    def on_train_end(self, trainer, pl_module) -> None:
        self.after.detach()
        trainer.optimizers[0].step()


def test_once_per_step(kit) -> None:
    count = Count()
    kit.fit(kit.Net(), count, max_steps=3, accumulate_grad_batches=2)
    assert count.batches == 6
    assert count.steps == [0, 1, 2]  # not yet raised
