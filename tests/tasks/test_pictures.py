import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image

from qlightning.tasks.pictures import image_grid, log_picture


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_images_stand_row_by_row_inside_a_border():
    images = torch.stack([torch.full((1, 2, 3), v) for v in (-1.0, 0.0, 1.0)])
    grid = image_grid(images, columns=2)
    assert grid.shape == (7, 9, 3)
    assert grid.dtype == torch.uint8
    assert (grid[1:3, 1:4] == 0).all()
    assert (grid[1:3, 5:8] == 128).all()
    assert (grid[4:6, 1:4] == 255).all()
    assert (grid[4:6, 5:8] == 127).all()
    assert (grid[0] == 127).all()


def test_colours_keep_their_channel_and_values_are_clamped():
    image = torch.tensor([3.0, -1.0, -7.0]).view(1, 3, 1, 1)
    assert image_grid(image, columns=1)[1, 1].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", [None, "csv", "tensorboard", "wandb"])
def test_the_picture_is_in_the_run_folder_and_in_the_logger(kind, trainer, tmp_path):
    logger = {
        None: lambda: False,
        "csv": lambda: CSVLogger(tmp_path / "log"),
        "tensorboard": lambda: TensorBoardLogger(tmp_path / "log"),
        "wandb": lambda: WandbLogger(save_dir=str(tmp_path / "log"), offline=True),
    }[kind]()
    run = trainer(logger=logger)
    picture = torch.arange(4 * 5 * 3, dtype=torch.uint8).view(4, 5, 3)
    (tmp_path / "log").mkdir()  # where wandb finds none it writes elsewhere
    log_picture(run, "samples", picture)
    found = list(tmp_path.rglob("samples/step=0000000.png"))
    assert [str(f.parent.parent) for f in found] == [str(run.log_dir)]
    assert np.array_equal(pixels(found[0]), picture.numpy())
    if kind == "tensorboard":
        logger.finalize("success")
        events = b"".join(f.read_bytes() for f in tmp_path.rglob("events.out.*"))
        assert b"samples" in events
        assert b"PNG" in events
    if kind == "wandb":
        (copy,) = tmp_path.rglob("media/images/samples*.png")
        assert np.array_equal(pixels(copy), picture.numpy())
        wandb.finish()


def test_a_fast_dev_run_leaves_nothing(trainer, tmp_path):
    log_picture(trainer(fast_dev_run=True), "samples", torch.zeros(4, 4, 3, dtype=torch.uint8))
    assert not list(tmp_path.rglob("*.png"))
