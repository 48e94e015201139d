"""A denoising diffusion model of images."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torchmetrics import MeanMetric

from qlightning.evaluation.bucketed_mean import BucketedMean
from qlightning.evaluation.held_out import HeldOut
from qlightning.schedules.learning_rate import Constant, Schedule
from qlightning.tasks.architecture import diffusers_model
from qlightning.tasks.denoising import Denoising
from qlightning.tasks.optimizer import adamw
from qlightning.tasks.pictures import image_grid, log_picture


class Diffusion(LightningModule):
    """Trains a UNet2DModel or DiTTransformer2DModel of diffusers by DDPM (Ho et al. 2020, arXiv 2006.11239).

    The model is built in `configure_model`, as `CausalLM` does and for its reasons. It is class-conditional where its
    config says so (`num_class_embeds` of the UNet, `num_embeds_ada_norm` of the DiT).

    Batches are `{"image": float (B, C, H, W) in [-1, 1], "label": LongTensor (B,)}`. Logs `train_loss`, and over the
    whole held-out set `val_loss` (what is trained on), `val_eps_mse` (mean squared error of the noise, comparable
    between predictions) and the same for each bucket of time steps. Noise and time steps of the held-out set depend on
    the batch index only: two evaluations of one model agree, and two models are measured on the same noise.

    Args:
        model: Local folder or hub name to start from, or a config for random weights, for example
            `{"_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1}`.
        prediction: What the model predicts: the noise, or the velocity of Salimans and Ho 2022 (arXiv 2202.00512).
        noise: Course of the noise over the time steps (`beta_schedule` of diffusers).
        timesteps: Number of time steps.
        lr: Peak learning rate of AdamW.
        betas: AdamW's two averaging factors.
        weight_decay: Decay of matrices; biases and norms have none.
        schedule: Learning rate over the run; constant when left out.
        buckets: Number of equal ranges of time steps that the held-out error is reported for.
        samples: Images in the grid that is drawn after a validation; 0 draws none.
        sample_every: Epochs between two grids of a fit; a validation of its own always draws one.
        sampling_steps: Denoising steps of an image.
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        *,
        prediction: Literal["epsilon", "v_prediction"] = "epsilon",
        noise: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "linear",
        timesteps: int = 1000,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        schedule: Schedule | None = None,
        buckets: int = 4,
        samples: int = 16,
        sample_every: int = 5,
        sampling_steps: int = 50,
    ) -> None:
        super().__init__()
        self.schedule = Schedule.of(schedule or Constant())
        self.save_hyperparameters(
            {
                "model": model,
                "prediction": prediction,
                "noise": noise,
                "timesteps": timesteps,
                "lr": lr,
                "betas": list(betas),
                "weight_decay": weight_decay,
                "schedule": self.schedule.plain(),
                "buckets": buckets,
                "samples": samples,
                "sample_every": sample_every,
                "sampling_steps": sampling_steps,
            }
        )
        self.process = Denoising(prediction, noise, timesteps)
        self.model: Any = None
        mean = MeanMetric(nan_strategy="disable")
        self.held_out = HeldOut(loss=mean, eps_mse=mean, buckets=BucketedMean(buckets))

    def configure_model(self) -> None:
        """Build the model. Called again by every fit, validate, test and predict: the first call counts."""
        if self.model is None:
            self.model, self.hparams["model"] = diffusers_model(self.hparams["model"])

    def forward(self, noisy: Tensor, step: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, C, H, W) noisy images at (B,) time steps, of (B,) classes, to the predicted noise or velocity."""
        assert self.model is not None, "call configure_model() first"
        return self.model(noisy, step, class_labels=label if self.classes else None).sample

    @property
    def classes(self) -> int:
        """Number of classes that the model is conditional on, 0 if it is not."""
        assert self.model is not None, "call configure_model() first"
        config = self.model.config
        return config.get("num_class_embeds") or config.get("num_embeds_ada_norm") or 0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        image = batch["image"]
        step = torch.randint(self.process.timesteps, (len(image),), device=image.device)
        error, _ = self._errors(batch, torch.randn_like(image), step)
        loss = error.mean()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """(B, C, H, W) new images of the batch's classes; their noise depends on the batch index only."""
        return self.sample(batch["image"].shape, label=batch["label"], seed=batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._report("val")
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        due = not fitting or (self.current_epoch + 1) % self.hparams["sample_every"] == 0
        if due and self.hparams["samples"] and not self.trainer.sanity_checking:
            count = self.hparams["samples"]
            label = torch.arange(count, device=self.device) % self.classes if self.classes else None
            images = self.sample((count, *self.image_shape), label=label)
            log_picture(self.trainer, "samples", image_grid(images, columns=math.ceil(count**0.5)))

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        options = self.hparams
        return adamw(
            self, self.schedule, lr=options["lr"], betas=options["betas"], weight_decay=options["weight_decay"]
        )

    def sample(self, shape: Sequence[int], *, label: Tensor | None = None, seed: int = 0) -> Tensor:
        """Images in [-1, 1] of `shape` (B, C, H, W) and of (B,) classes; `seed` decides all noise, on every device."""
        generator = torch.Generator().manual_seed(seed)
        dtype: Any = self.dtype
        start = torch.randn(tuple(shape), generator=generator).to(self.device, dtype)
        steps = self.hparams["sampling_steps"]
        return self.process.sample(lambda x, t: self(x, t, label), start, steps=steps, generator=generator)

    def _errors(self, batch: dict[str, Tensor], noise: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        return self.process.errors(lambda x, t: self(x, t, batch["label"]), batch["image"], noise, step)

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int, stage: str) -> None:
        self.image_shape = batch["image"].shape[1:]
        noise, step = self.process.held_out(batch["image"], batch_idx)
        error, eps_error = self._errors(batch, noise, step)
        bucket = step * self.hparams["buckets"] // self.process.timesteps
        self.held_out.update(stage, loss=error, eps_mse=eps_error, buckets=(eps_error, bucket))

    def _report(self, stage: str) -> None:
        values = self.held_out.finish(stage)
        width = self.process.timesteps / self.hparams["buckets"]
        for i, mean in enumerate(values.pop(f"{stage}_buckets")):
            if not mean.isnan():  # a bucket of a small trial may have seen nothing
                values[f"{stage}_eps_mse_t{round(i * width)}-{round((i + 1) * width)}"] = mean
        self.log_dict(values, sync_dist=True)
