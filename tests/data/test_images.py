"""Pictures come out as they went in, splits are disjoint, mirrored pictures are a function of (seed, epoch, index)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from qlightning.data import Digits, ImageData

SPLITS = ("train", "validation", "test")


def everything(data: Digits | ImageData, split: str) -> tuple[Tensor, Tensor]:
    pictures = data.dataset(split)
    samples = [pictures[i] for i in range(len(pictures))]
    return torch.stack([s["image"] for s in samples]), torch.stack([s["label"] for s in samples])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """30 grey 6x4 pictures of two classes, as a folder per class; brightness tells the picture."""
    for i in range(30):
        path = tmp_path / "pictures" / ("even" if i % 2 == 0 else "odd") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 6), 8 * i, np.uint8)).save(path)
    return tmp_path / "pictures"


def test_digits_are_those_of_scikit_learn():
    data = Digits()
    found = [everything(data, split) for split in SPLITS]
    assert [len(labels) for _, labels in found] == [1437, 180, 180]
    images, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    source = load_digits()
    key = lambda image, label: (*image.flatten().tolist(), int(label))  # noqa: E731
    sixteenths = ((images + 1) * 8).round()
    assert (sixteenths / 8 - 1 - images).abs().max() <= 1.001 / 255
    ours = sorted(key(i, t) for i, t in zip(sixteenths, labels, strict=True))
    assert ours == sorted(key(i, t) for i, t in zip(torch.from_numpy(source.images), source.target, strict=True))
    assert (images.min(), images.max()) == (-1, 1)
    assert (data.num_classes, data.channels, data.size) == (10, 1, 8)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_batches(stage):
    data = Digits(batch_size=6, max_images=20, size=10, channels=3)
    data.setup(stage)
    loader = {
        "fit": data.train_dataloader,
        "validate": data.val_dataloader,
        "test": data.test_dataloader,
        "predict": data.predict_dataloader,
    }[stage]()
    sizes = []
    for batch in loader:
        assert batch.keys() == {"image", "label"}
        assert (batch["image"].dtype, batch["label"].dtype) == (torch.float32, torch.int64)
        assert batch["image"].shape[1:] == (3, 10, 10)
        assert batch["label"].shape == batch["image"].shape[:1]
        sizes.append(len(batch["label"]))
    assert sizes == ([6, 6, 6] if stage == "fit" else [6, 6, 6, 2])


def test_digits_of_another_size():
    plain, labels = everything(Digits(max_images=5), "train")
    padded, same = everything(Digits(max_images=5, size=11), "train")
    assert torch.equal(labels, same)
    assert torch.equal(padded[:, :, 1:9, 1:9], plain)
    assert padded.sum().item() == pytest.approx(plain.sum().item() - 5 * (121 - 64), abs=0.01)
    resized, _ = everything(Digits(max_images=5, size=16, fill="resize"), "train")
    assert torch.nn.functional.avg_pool2d(resized, 2).sub(plain).abs().max() < 0.6
    assert not torch.equal(resized[:, :, 4:12, 4:12], plain)


def test_mirrored_by_seed_epoch_and_index():
    plain, _ = everything(Digits(), "train")
    pictures = Digits(flip=0.5, seed=3).dataset("train")

    def mirrored(epoch: int, seed: int = 3) -> Tensor:
        view = Digits(flip=0.5, seed=seed).dataset("train").at_epoch(epoch)
        return torch.stack(
            [torch.equal(view[i]["image"], plain[i].flip(-1)) * torch.ones(1) for i in range(200)]
        ).flatten()

    first = mirrored(0)
    assert 70 < first.sum() < 130
    assert torch.equal(mirrored(0), first)
    assert not torch.equal(mirrored(1), first)
    assert not torch.equal(mirrored(0, seed=4), first)
    view = pictures.at_epoch(0)
    assert torch.equal(view.__getitems__([7, 3])[1]["image"], view[3]["image"])
    assert torch.equal(pictures[0]["image"], plain[0])  # the view left the original alone
    held_out = Digits(flip=1.0)
    assert torch.equal(everything(held_out, "test")[0], everything(Digits(), "test")[0])
    assert torch.equal(held_out.dataset("train").at_epoch(0)[0]["image"], plain[0].flip(-1))


def test_folder_of_pictures(folder):
    data = ImageData(str(folder), size=4, channels=1, held_out=0.1)
    assert data.num_classes == 2
    found = {split: everything(data, split) for split in SPLITS}
    assert {split: len(labels) for split, (_, labels) in found.items()} == {"train": 24, "validation": 3, "test": 3}
    images, labels = (torch.cat(parts) for parts in zip(*found.values(), strict=True))
    assert images.shape == (30, 1, 4, 4)
    numbers = ((images + 1) * 127.5 / 8).round().long()
    assert torch.equal(numbers[:, 0, 0, 0].sort().values, torch.arange(30))
    assert torch.equal(numbers[:, 0, 0, 0] % 2, labels)
    assert everything(ImageData(str(folder), size=3), "train")[0].shape == (26, 3, 3, 3)


def test_the_middle_square_is_kept(tmp_path):
    picture = np.zeros((4, 8), np.uint8)
    picture[:, 2:6] = 255
    for name in ("train/a/0.png", "train/b/0.png", "validation/a/0.png", "validation/b/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.fromarray(picture).save(tmp_path / name)
    images, _ = everything(ImageData(str(tmp_path), size=4), "train")
    assert torch.equal(images, torch.ones(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("options", "correction"),
    [
        ({"path": "./nowhere"}, "does not exist; write"),
        ({"image_column": "picture"}, "no column 'picture' of pictures; write for example image_column='image'"),
        ({"label_column": "class"}, "no column 'class' of class numbers; write for example label_column='label'"),
        ({"label_column": "image"}, "no column 'image' of class numbers; write for example label_column='label'"),
        ({"image_column": "label"}, "no column 'label' of pictures; write for example image_column='image'"),
        ({"size": 0}, "size=32, channels=3"),
        ({"channels": 2}, "size=32, channels=3"),
        ({"flip": 2.0}, "flip=0.5"),
        ({"max_images": 0}, "max_images=1000"),
        ({"held_out": 1.5}, "held_out=0.05"),
        ({"batch_size": 99}, "batch_size=26 or less"),
    ],
    ids=str,
)
def test_errors_show_the_corrected_call(folder, options, correction):
    with pytest.raises(ValueError, match=correction):
        ImageData(**{"path": str(folder), "size": 4, **options}).train_dataloader()


def test_pictures_without_classes_are_refused(tmp_path):
    for i in range(5):
        Image.new("L", (4, 4)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="none of its columns holds class numbers"):
        ImageData(str(tmp_path)).dataset("train")


def test_a_split_that_is_not_there(folder):
    for split in ("train", "validation"):
        (folder / split).mkdir()
    (folder / "even").rename(folder / "train" / "even")
    (folder / "odd").rename(folder / "validation" / "odd")
    with pytest.raises(ValueError, match=r"no split 'test' but train, validation.*data_files=\{'test'"):
        ImageData(str(folder), size=4).test_dataloader()


@pytest.mark.parametrize(("options", "correction"), [({"size": 7}, r"size=8"), ({"fill": "stretch"}, "fill='pad'")])
def test_digits_errors(options, correction):
    with pytest.raises(ValueError, match=correction):
        Digits(**options)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data=Digits", "--data.fill=resize", "--data.size=16", "--data.flip=0.5"],
        ["--data=ImageData", "--data.path=x", "--data.size=16", "--data.channels=1", "--data.label_column=fine_label"],
    ],
)
def test_command_line(arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    data = parser.instantiate(parser.parse_args(arguments)).data
    assert data.size == 16
    with pytest.raises(Exception, match="channels"):
        parser.parse_args([*arguments, "--data.channels=2"])
