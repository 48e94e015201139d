"""An image classifier."""

from typing import Any

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from qlightning.evaluation.held_out import HeldOut
from qlightning.schedules.learning_rate import Constant, Schedule
from qlightning.tasks.architecture import from_data, plain_config, transformers_model
from qlightning.tasks.optimizer import adamw


class ImageClassification(LightningModule):
    """Trains an image classifier of transformers (ViT, Swin, ...) on cross-entropy.

    The model is built in `configure_model`, as `CausalLM` does and for its reasons.

    Batches are `{"image": float (B, C, H, W) in [-1, 1], "label": LongTensor (B,)}`. Logs `train_loss`, and over the
    whole held-out set `val_loss` and `val_accuracy`.

    Args:
        model: Local folder or hub name to start from, or a config for random weights, for example
            `{"model_type": "vit", "image_size": 8, "patch_size": 2, "num_channels": 1}`. A config without `num_labels`
            takes the datamodule's `num_classes`.
        lr: Peak learning rate of AdamW.
        betas: AdamW's two averaging factors.
        weight_decay: Decay of matrices; biases and norms have none.
        label_smoothing: Share of the target spread evenly over all classes, in training only.
        schedule: Learning rate over the run; constant when left out.
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.05,
        label_smoothing: float = 0.0,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        self.schedule = Schedule.of(schedule or Constant())
        self.save_hyperparameters(
            {
                "model": model,
                "lr": lr,
                "betas": list(betas),
                "weight_decay": weight_decay,
                "label_smoothing": label_smoothing,
                "schedule": self.schedule.plain(),
            }
        )
        self.model: Any = None

    def configure_model(self) -> None:
        """Build the model. Called again by every fit, validate, test and predict: the first call counts."""
        if self.model is not None:
            return
        from transformers import AutoModelForImageClassification

        classes = from_data(self, "num_classes")
        model = transformers_model(
            AutoModelForImageClassification, self.hparams["model"], known={"num_labels": classes}
        )
        labels = model.config.num_labels
        if classes is not None and classes > labels:
            raise ValueError(f"the data has {classes} classes and the model {labels}: set num_labels={classes}")
        accuracy = MulticlassAccuracy(num_classes=labels, average="micro")
        self.held_out = HeldOut(loss=MeanMetric(nan_strategy="disable"), accuracy=accuracy)
        self.model = model
        self.hparams["model"] = plain_config(model)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) images in [-1, 1] to (B, classes) logits."""
        assert self.model is not None, "call configure_model() first"
        return self.model(pixel_values=image).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self(batch["image"]).float()
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=self.hparams["label_smoothing"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(batch["image"])

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.held_out.finish("val"), prog_bar=True, sync_dist=True)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.held_out.finish("test"), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        options = self.hparams
        return adamw(
            self, self.schedule, lr=options["lr"], betas=options["betas"], weight_decay=options["weight_decay"]
        )

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        logits, label = self(batch["image"]).float(), batch["label"]
        loss = F.cross_entropy(logits, label, reduction="none")
        self.held_out.update(stage, loss=loss, accuracy=(logits, label))
