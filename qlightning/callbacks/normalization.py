"""Normalization: the statistics of batch norms measured anew, once weights are quantized."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from qlightning.callbacks.batches import CalibrationBatches
from qlightning.optim.weights import weights_of
from qlightning.solvers.batch_norm import reestimate


class Normalization(Callback):
    """Measures the mean and variance of every batch norm anew at the step at which weights begin to be quantized.

    Stands after the callbacks that quantize weights and find their bits. The data are all of
    `datamodule.calibration_dataloader()`, or the first batches of the training data; `training_step` runs on them. See
    `solvers/batch_norm.py` for what else can be done with batch norms.

    Args:
        batches: Number of batches of the training data, in each process.
    """

    def __init__(self, batches: int = 16) -> None:
        if batches < 1:
            raise ValueError(f"Normalization(batches={batches}): at least one, for example Normalization(batches=16)")
        self.batches = batches
        self.done = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.global_step:  # what a resumed run has done is loaded after this
            self.done = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.done or not any(True for _ in weights_of(pl_module)):
            return
        with trainer.precision_plugin.train_step_context():
            count = reestimate(pl_module, CalibrationBatches(trainer, self.batches))
        self.done = True
        rank_zero_info(f"Normalization: {count} batch norms measured anew at step {trainer.global_step}")

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = state_dict["done"]
