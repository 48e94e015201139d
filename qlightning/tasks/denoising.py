"""DDPM (Ho et al. 2020, arXiv 2006.11239): adding noise to images, what a model learns from it, and the way back.

The course of the noise is diffusers' `DDPMScheduler`; here stands what a task does with it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qlightning.tasks.architecture import import_diffusers

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(B, C, H, W) noisy images at (B,) time steps to the predicted noise or velocity."""


class Denoising:
    """The process of one diffusion model.

    Args:
        prediction: `epsilon` (the noise) or `v_prediction` (the velocity of Salimans and Ho 2022, arXiv 2202.00512).
        noise: Course of the noise over the time steps (`beta_schedule` of diffusers).
        timesteps: Number of time steps.
    """

    def __init__(self, prediction: str, noise: str, timesteps: int) -> None:
        scheduler = import_diffusers().DDPMScheduler
        self.timesteps = timesteps
        self.scheduler = scheduler(num_train_timesteps=timesteps, beta_schedule=noise, prediction_type=prediction)

    def target(self, image: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """What the model should predict for `image` under `noise` at time step `step`, shaped as the image."""
        if self.scheduler.config.prediction_type == "epsilon":
            return noise
        return self.scheduler.get_velocity(image, noise, step)

    def errors(self, model: Denoiser, image: Tensor, noise: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) mean squares, in float32, of the error in the prediction and of the error in the noise it implies."""
        prediction = model(self.scheduler.add_noise(image, noise, step), step)
        error = (prediction.float() - self.target(image, noise, step).float()).square().flatten(1).mean(1)
        if self.scheduler.config.prediction_type == "epsilon":
            return error, error
        # noise = sqrt(a) velocity + sqrt(1 - a) noisy, so an error in the velocity counts sqrt(a) times in the noise
        return error, error * self.scheduler.alphas_cumprod.to(step.device)[step]

    def held_out(self, image: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Noise and time steps to measure on: a function of the batch's shape and index, never of the global generator.

        Returns:
            Noise shaped as the image, and (B,) time steps, one from each of B equal ranges, so that every batch covers
            them evenly.
        """
        generator = torch.Generator().manual_seed(index)
        noise = torch.randn(image.shape, generator=generator).to(image)
        place = (torch.arange(len(image)) + torch.rand(len(image), generator=generator)) / len(image)
        return noise, (place * self.timesteps).long().clamp(max=self.timesteps - 1).to(image.device)

    @torch.no_grad()
    def sample(self, model: Denoiser, start: Tensor, *, steps: int, generator: torch.Generator) -> Tensor:
        """Images in [-1, 1] out of noise.

        Args:
            model: The denoiser.
            start: (B, C, H, W) standard normal noise.
            steps: Denoising steps; fewer than the time steps are spread over them.
            generator: On the CPU, so that all devices draw the same noise.
        """
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps)
        image = start
        for step in scheduler.timesteps:
            prediction = model(image, step.expand(len(image)).to(image.device))
            image = scheduler.step(prediction, step, image, generator=generator).prev_sample
        return image.clamp(-1, 1)
