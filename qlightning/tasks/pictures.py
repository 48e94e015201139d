"""Pictures of a run: a PNG in the run folder, and an image in every logger that takes one."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def image_grid(images: Tensor, *, columns: int) -> Tensor:
    """Images side by side, with a border of one pixel.

    Args:
        images: (B, C, H, W) in [-1, 1]; one channel or three.
        columns: Images in a row.

    Returns:
        (rows * (H + 1) + 1, columns * (W + 1) + 1, 3) uint8.
    """
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    canvas = torch.full((3, rows * (height + 1) + 1, columns * (width + 1) + 1), 127, dtype=torch.uint8)
    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    for i, image in enumerate(pixels.expand(count, 3, height, width) if channels == 1 else pixels):
        top, left = 1 + (i // columns) * (height + 1), 1 + (i % columns) * (width + 1)
        canvas[:, top : top + height, left : left + width] = image
    return canvas.permute(1, 2, 0).contiguous()


def log_picture(trainer: Any, name: str, picture: Tensor) -> None:
    """Write `<run folder>/<name>/step=<step>.png` and hand the picture to the loggers. Call it on every process.

    Args:
        trainer: The Trainer; its first logger's folder, or its `default_root_dir`, is the run folder.
        name: Name of the series of pictures.
        picture: (H, W, 3) uint8.
    """
    folder = trainer.log_dir or trainer.default_root_dir
    if not trainer.is_global_zero or trainer.fast_dev_run:  # a fast_dev_run leaves nothing behind
        return
    from PIL import Image

    image = Image.fromarray(picture.numpy())
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):  # Weights & Biases, Comet, ...
            logger.log_image(key=name, images=[image], step=trainer.global_step)
        elif hasattr(logger.experiment, "add_image"):  # TensorBoard
            logger.experiment.add_image(name, picture.numpy(), trainer.global_step, dataformats="HWC")
    path = Path(folder) / name / f"step={trainer.global_step:07d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
