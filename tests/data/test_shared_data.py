"""The same DataModules over real data sets in the forms of the hub."""

from pathlib import Path

import pytest
import torch

from qlightning.data import ImageData, TextData

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the data sets in {SHARED}")


def test_techdocs_with_its_tokenizer():
    data = TextData(
        str(SHARED / "techdocs"), str(SHARED / "techdocs/tokenizer"), max_bytes=400_000, sequence_length=128
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))["input_ids"]
    assert batch.shape == (16, 128)
    assert data.vocab_size == 8192
    assert 3.0 < data.bytes_per_token < 4.5
    stream = data.dataset("validation").tokens
    text = data.tokenizer.decode(stream.tolist())
    assert text.split("<|endoftext|>")[:-1] == data.documents("validation")
    assert not set(data.documents("train")) & set(data.documents("validation"))


def test_wikitext_lines_join_to_the_article():
    data = TextData(str(SHARED / "wikitext2"), separator="", sequence_length=512)
    data.setup("test")
    first = next(iter(data.test_dataloader()))["input_ids"].flatten()
    assert data.tokenizer.decode(first.tolist()).startswith(
        " \n = Robert <unk> = \n \n Robert <unk> is an English film"
    )
    assert len(data.dataset("test")) == sum(len(line.encode()) for line in data.documents("test")) // 512
    assert data.bytes_per_token == 1.0
    with pytest.raises(ValueError, match="no text in the split 'train'"):
        data.train_dataloader()


def test_shakespeare():
    path = SHARED / "shakespeare" / "input.txt"
    data = TextData(str(path))
    parts = [data.documents(split)[0] for split in ("train", "validation", "test")]
    assert "".join(parts) == path.read_text()
    assert [part.count("\n") for part in parts] == [36000, 2000, 2000]


def test_cifar10():
    data = ImageData(str(SHARED / "cifar10"), flip=0.5, max_images=300)
    data.setup("fit")
    data.setup("test")
    assert (data.num_classes, data.channels, data.size) == (10, 3, 32)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (64, 3, 32, 32)
    assert batch["image"].min() == -1
    assert 0.4 < batch["image"].std() < 0.6  # the published standard deviation is 0.25 on a scale of 0 to 1
    assert set(range(10)) == {int(label) for batch in data.test_dataloader() for label in batch["label"]}
    assert [len(data.dataset(split)) for split in ("train", "validation", "test")] == [300, 300, 300]
    images = [data.dataset(split).images for split in ("train", "validation")]
    assert not torch.equal(*images)
