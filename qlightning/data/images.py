"""Pictures: batches `{"image": float32 (B, C, H, W) in [-1, 1], "label": LongTensor (B,)}`.

Pictures are decoded once, to one uint8 tensor in memory, which is kept in the cache between runs.
"""

import copy
import io
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from qlightning.data.cache import cached, fingerprint
from qlightning.data.loader import seeded
from qlightning.data.progress import progress
from qlightning.data.sources import load_rows
from qlightning.data.splits import TEST, TRAIN, VALIDATION, SplitData, hold_out

if TYPE_CHECKING:
    import datasets

_MODES = {1: "L", 3: "RGB"}


class Pictures(Dataset[dict[str, Tensor]]):
    """Pictures and labels in memory, some of them mirrored in each epoch.

    Args:
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).
        flip: Probability that a picture is mirrored left to right, decided by (seed, epoch, index).
        seed: Seed of that decision.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, flip: float = 0.0, seed: int = 0) -> None:
        self.images, self.labels, self.flip, self.seed = images, labels, flip, seed
        self.flipped = torch.zeros(len(images), dtype=torch.bool)

    def at_epoch(self, epoch: int) -> "Pictures":
        """The same pictures as they look in one epoch."""
        view = copy.copy(self)
        view.flipped = torch.rand(len(self), generator=seeded("flip", self.seed, epoch)) < self.flip
        return view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Several samples at once, as torch's DataLoader asks for them."""
        chosen = torch.as_tensor(indices)
        images, flipped = self.images[chosen], self.flipped[chosen]
        images[flipped] = images[flipped].flip(-1)
        pairs = zip(images.float() / 127.5 - 1, self.labels[chosen], strict=True)
        return [{"image": image, "label": label} for image, label in pairs]


class PictureSplits(SplitData):
    """Labelled pictures of one size. A subclass says where they come from.

    Args:
        size: Height and width of a picture.
        channels: 1 (grey) or 3 (red, green, blue).
        flip: Probability that a training picture is mirrored left to right, decided by (seed, epoch, index).
        batch_size: Pictures in a batch, per process.
        seed: With the epoch it decides the order of the training pictures and which of them are mirrored.
        num_workers: Processes that read ahead. The pictures lie in memory, where 0 is the fastest.
        max_images: At most so many pictures of each split.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        *,
        size: int = 32,
        channels: Literal[1, 3] = 3,
        flip: float = 0.0,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        max_images: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        if size < 1 or channels not in _MODES:
            raise ValueError(f"size={size}, channels={channels} is no picture; write for example size=32, channels=3")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip={flip} is no probability; write flip=0.5 to mirror half of the pictures")
        if max_images is not None and max_images < 1:
            raise ValueError(f"max_images={max_images} leaves no pictures; write for example max_images=1000")
        self.size, self.channels, self.flip, self.max_images = size, channels, flip, max_images

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of labels."""

    @abstractmethod
    def read_pictures(self, split: str) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) in uint8 and labels (N,) in int64 of one split."""

    def read(self, split: str) -> Pictures:
        """The pictures of one split; only those of "train" are mirrored."""
        images, labels = self.read_pictures(split)
        return Pictures(images, labels, flip=self.flip if split == TRAIN else 0.0, seed=self.seed)


class ImageData(PictureSplits):
    """Pictures of a hub data set, of local parquet files, or of a folder with one folder per class.

    A picture of another size is resized by its shorter side and cropped to the middle square. Where no validation split
    exists, validation and, if it is missing too, test are held out of train. For data sets that fit into memory.

    Args:
        path: Name of a hub data set, or a local folder or file.
        image_column: Column of the pictures. None: "image" or "img".
        label_column: Column of the class numbers. None: "label" or "labels".
        subset: Configuration of a hub data set.
        data_files: Split name ("train", "validation", "test") to file name or glob pattern below `path`. None: told by
            the file names.
        held_out: Share of each split that has to be held out of train.
        **options: Those of `PictureSplits`: size, channels, flip, batch_size, seed, num_workers, max_images.

    Raises:
        ValueError: A missing path, column or split, or a column of another kind.
    """

    def __init__(
        self,
        path: str,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        subset: str | None = None,
        data_files: dict[str, str] | None = None,
        held_out: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.path, self.image_column, self.label_column = path, image_column, label_column
        self.subset, self.data_files, self.held_out = subset, data_files, held_out

    @cached_property
    def num_classes(self) -> int:
        """Number of labels, as the data set declares it or else by the highest one."""
        rows = next(iter(self._splits.values()))
        declared = getattr(rows.features[self._label(rows)], "num_classes", None)
        return declared or 1 + max(max(rows[self._label(rows)]) for rows in self._splits.values())

    def read_pictures(self, split: str) -> tuple[Tensor, Tensor]:
        """Decoded pictures and their labels."""
        from datasets import Image

        if split not in self._splits:
            raise ValueError(
                f"{self.path!r} has no split {split!r} but {', '.join(self._splits)}; write for example "
                f"ImageData({self.path!r}, data_files={{{split!r}: '*.parquet'}})"
            )
        rows = self._splits[split]
        rows = rows.select(range(min(len(rows), self.max_images or len(rows))))
        column, label = self._image(rows), self._label(rows)
        # As one table and undecoded: row by row takes ten times as long.
        table = rows.cast_column(column, Image(decode=False)).with_format("arrow")[:]
        encoded = [entry["bytes"] or Path(entry["path"]).read_bytes() for entry in table[column].to_pylist()]
        return _decode(encoded, self.size, self.channels), torch.tensor(table[label].to_pylist(), dtype=torch.int64)

    def _image(self, rows: "datasets.Dataset") -> str:
        from datasets import Image

        fitting = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
        return self._column("image_column", self.image_column, ("image", "img"), "pictures", fitting)

    def _label(self, rows: "datasets.Dataset") -> str:
        fitting = [name for name, feature in rows.features.items() if "int" in str(getattr(feature, "dtype", ""))]
        return self._column("label_column", self.label_column, ("label", "labels"), "class numbers", fitting)

    def _column(self, option: str, given: str | None, known: Sequence[str], kind: str, fitting: Sequence[str]) -> str:
        for name in (given,) if given else known:
            if name in fitting:
                return name
        raise ValueError(
            f"{self.path!r} has no column {given or ' or '.join(known)!r} of {kind}; "
            + (f"write for example {option}={fitting[0]!r}" if fitting else f"none of its columns holds {kind}")
        )

    @cached_property
    def _splits(self) -> "dict[str, datasets.Dataset]":
        splits = load_rows(self.path, subset=self.subset, data_files=self.data_files)
        if TRAIN in splits and VALIDATION not in splits:
            rows = splits[TRAIN]
            parts = [split for split in (VALIDATION, TEST) if split not in splits]
            splits |= {part: rows.select(some) for part, some in hold_out(len(rows), self.held_out, parts).items()}
        return splits


def _decode(encoded: Sequence[bytes], size: int, channels: int) -> Tensor:
    from PIL import Image, ImageOps

    def square(data: bytes) -> np.ndarray:
        picture = Image.open(io.BytesIO(data)).convert(_MODES[channels])
        if picture.size != (size, size):
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
        return np.asarray(picture).reshape(size, size, channels).transpose(2, 0, 1)

    def write(path: Path) -> None:
        images = np.empty((len(encoded), channels, size, size), np.uint8)
        for i, data in enumerate(progress(encoded, "Decoding pictures")):
            images[i] = square(data)
        with open(path, "wb") as file:
            np.save(file, images)

    return torch.from_numpy(np.load(cached(f"images-{size}-{channels}-{fingerprint(encoded)}.npy", write)))


class Digits(PictureSplits):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, with nothing to download; 10 % validation, 10 % test.

    Args:
        size: Height and width, 8 or more.
        channels: 1, or 3 equal ones.
        fill: What a larger size is made of: "pad" sets the digit in the middle of black, "resize" interpolates.
        **options: Those of `PictureSplits`: flip, batch_size, seed, num_workers, max_images.
    """

    num_classes = 10

    def __init__(
        self,
        *,
        size: int = 8,
        channels: Literal[1, 3] = 1,
        fill: Literal["pad", "resize"] = "pad",
        **options: Any,
    ) -> None:
        super().__init__(size=size, channels=channels, **options)
        if size < 8 or fill not in ("pad", "resize"):
            raise ValueError(
                f"size={size}, fill={fill!r}: the digits are 8x8; write Digits(size=8) or more, fill='pad'"
            )
        self.fill = fill

    def read_pictures(self, split: str) -> tuple[Tensor, Tensor]:
        """The digits of one split."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        chosen = hold_out(len(digits.target), 0.1, (VALIDATION, TEST))[split][: self.max_images]
        images = torch.from_numpy(digits.images[chosen]).float()[:, None] / 16 * 255
        if self.fill == "pad":
            before = (self.size - 8) // 2
            after = self.size - 8 - before
            images = torch.nn.functional.pad(images, (before, after, before, after))
        else:
            images = torch.nn.functional.interpolate(images, size=(self.size, self.size), mode="bilinear")
        labels = torch.from_numpy(digits.target[chosen]).long()
        return images.round().to(torch.uint8).expand(-1, self.channels, -1, -1), labels
