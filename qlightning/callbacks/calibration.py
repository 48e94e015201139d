"""Calibration without training: a run that ends, with a checkpoint, when a solver has found the quantized weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from qlightning.callbacks.phase import phases_of
from qlightning.callbacks.qat import QATCallback

if TYPE_CHECKING:
    from qlightning.solvers import Solver


class Calibration(Callback):
    """Saves a checkpoint as soon as the quantized weights are found, and ends the run before the first step.

    It stands after the QATCallback, whose `init` finds them. The checkpoint validates, exports and goes on training,
    `fit(..., ckpt_path=out)`, as any other.

    Args:
        out: The checkpoint's path.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)

    def on_train_batch_start(  # type: ignore[override]  # Lightning takes -1, though it does not say so
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> int:
        trainer.save_checkpoint(self.out)
        trainer.should_stop = True
        return -1  # no more batches of this epoch


def calibrating(trainer: Trainer, solver: "Solver") -> None:
    """Let the run's QATCallback find its weights by a solver, in its first step, whatever its schedule was.

    Raises:
        ValueError: The run has no QATCallback.
    """
    found = [callback for callback in trainer.callbacks if isinstance(callback, QATCallback)]  # type: ignore[attr-defined]
    if not found:
        raise ValueError("nothing says what is quantized: add --method LSQ, or a QATCallback to trainer.callbacks")
    found[0].init, found[0].start = solver, 0
    found[0].schedule = phases_of(None, start=0, freeze_scales=None, ramp=0, anneal=None)
