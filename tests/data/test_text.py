"""Windows hold the text of their split, splits are disjoint, tokenizers are deterministic, errors show the way out."""

import json
import re
import sys
import sysconfig
from itertools import chain
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from qlightning.data import StandardLibraryText, TextData
from qlightning.data.text import Windows
from qlightning.data.tokenizer import load_tokenizer

SPLITS = ("train", "validation", "test")


def stream(data: StandardLibraryText | TextData, split: str) -> str:
    windows = data.dataset(split)
    assert isinstance(windows, Windows)
    return data.tokenizer.decode(windows.tokens.tolist())


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty documents, each recognised by its number."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [json.dumps({"text": f"document {i} says hello to the world", "other": 0}) for i in range(40)]
    (folder / "all.jsonl").write_text("\n".join(lines))
    return folder


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"document (\d+)", text)]


def test_standard_library_splits():
    data = StandardLibraryText(max_bytes=100_000)
    files = {split: data.files(split) for split in SPLITS}
    names = [path for paths in files.values() for path in paths]
    assert len(set(names)) == len(names) > 200
    assert len(files["train"]) > 10 * len(files["test"]) > 0
    root = Path(sysconfig.get_paths()["stdlib"])
    assert root / "dataclasses.py" in names
    assert not [name for name in names if {"test", "site-packages", "encodings"} & set(name.parts)]
    for split in SPLITS:
        text = stream(data, split)
        assert 90_000 < sum(len(document.encode()) for document in data.documents(split)) <= 100_000
        assert text.startswith(files[split][0].read_text())
        assert len(data.dataset(split)) == len(text.encode()) // 256


def test_standard_library_batches():
    data = StandardLibraryText(sequence_length=32, batch_size=4, max_bytes=20_000)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.keys() == {"input_ids"}
    assert batch["input_ids"].shape == (4, 32)
    assert batch["input_ids"].dtype == torch.int64
    assert data.vocab_size == 256
    assert data.bytes_per_token == 1.0
    in_order = torch.cat([batch["input_ids"].flatten() for batch in data.val_dataloader()])
    assert data.tokenizer.decode(in_order.tolist()) == stream(data, "validation")[: len(in_order)]


def test_trained_tokenizer(tmp_path, monkeypatch):
    options = {"sequence_length": 16, "max_bytes": 50_000}
    data = StandardLibraryText("bpe-400", **options)
    data.setup("fit")
    text = "".join(data.documents("validation"))
    assert stream(data, "validation").replace("<|endoftext|>", "") == text
    assert data.vocab_size == 400
    tokens = data.dataset("validation").tokens
    assert data.bytes_per_token == len(text.encode()) / len(tokens) > 1.5
    assert int((tokens == data.tokenizer.end).sum()) == len(data.documents("validation"))

    monkeypatch.setenv("QLIGHTNING_CACHE", str(tmp_path))
    again = StandardLibraryText("bpe-400", **options)
    again.setup("fit")
    assert again.tokenizer.identity == data.tokenizer.identity
    assert torch.equal(again.dataset("train").tokens, data.dataset("train").tokens)
    assert {path.name.split("-")[0] for path in tmp_path.iterdir()} == {"bpe", "tokens"}


def test_cached_tokens_belong_to_their_text(corpus):
    texts = [["ab", "c"], ["a", "bc"], ["ab", "d"]]
    tokenizer = load_tokenizer("bpe-300", lambda: ["some text"])
    streams = [tokenizer.encode(text, separator).tolist() for text in texts for separator in (None, "-")]
    streams += [tokenizer.encode(text, separator).tolist() for text in texts for separator in (None, "-")]
    assert streams[:6] == streams[6:]
    assert len({tuple(one) for one in streams}) == 6
    assert [tokenizer.decode(streams[i]) for i in (1, 3, 5)] == ["ab-c", "a-bc", "ab-d"]


def test_documents_are_held_out(corpus):
    data = TextData(str(corpus), sequence_length=16, held_out=0.1)
    found = {split: numbers(stream(data, split)) for split in SPLITS}
    assert {split: len(some) for split, some in found.items()} == {"train": 32, "validation": 4, "test": 4}
    assert sorted(chain(*found.values())) == list(range(40))
    other = TextData(str(corpus), sequence_length=16, held_out=0.1, seed=9)
    assert stream(other, "test") == stream(data, "test")


def test_one_document_is_cut_at_line_ends(tmp_path):
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "input.txt").write_text(text)
    data = TextData(str(tmp_path / "input.txt"), sequence_length=4, held_out=0.1)
    parts = [stream(data, split) for split in SPLITS]
    assert "".join(parts) == text
    assert [part.count("\n") for part in parts] == [80, 10, 10]
    with pytest.raises(ValueError, match=r"held_out=0.6 of 100 samples.*held_out=0.05"):
        TextData(str(tmp_path / "input.txt"), held_out=0.6).setup("fit")


def test_splits_by_file_name(tmp_path):
    for name in ("train-00000-of-00002.txt", "train-00001-of-00002.txt", "val.txt", "test/part.txt", "README.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text of {name}")
    data = TextData(str(tmp_path), sequence_length=4, separator="|")
    assert stream(data, "train") == "text of train-00000-of-00002.txt|text of train-00001-of-00002.txt"
    assert stream(data, "validation") == "text of val.txt"
    assert stream(data, "test") == "text of test/part.txt"
    assert data.bytes_per_token == 1.0
    files = {"train": "val.txt", "validation": "train-*.txt"}
    named = TextData(str(tmp_path), sequence_length=4, data_files=files)
    assert stream(named, "train") == "text of val.txt"
    assert stream(named, "validation").count("text of train") == 2
    with pytest.raises(ValueError, match="data_files"):
        named.test_dataloader()


def test_predict_reads_test(corpus):
    data = TextData(str(corpus), sequence_length=16)
    data.setup("predict")
    batches = [
        torch.cat([b["input_ids"] for b in loader]) for loader in (data.predict_dataloader(), data.test_dataloader())
    ]
    assert torch.equal(*batches)


@pytest.mark.parametrize(
    ("options", "correction"),
    [
        ({"path": "./nowhere"}, "does not exist; write"),
        ({"column": "txt"}, "no column 'txt' but text, other.*column='text'"),
        ({"sequence_length": 9999}, r"train.*sequence_length=\d+ or less"),
        ({"sequence_length": 0}, "sequence_length=1000"),
        ({"max_bytes": 0}, "max_bytes=1000"),
        ({"tokenizer": "byte"}, "tokenizer='byte' is not known.*'bytes', 'bpe-1024'"),
        ({"tokenizer": "bpe-100"}, "'bpe-1024'"),
        ({"tokenizer": "./nowhere"}, "tokenizer='./nowhere' is not known.*'bytes', 'bpe-1024'"),
        ({"held_out": 0.5}, "held_out=0.05"),
        ({"data_files": {"train": "*.parquet"}}, "matches no file"),
        ({"data_files": {"training": "all.jsonl"}}, "write 'train', 'validation' or 'test'"),
    ],
    ids=str,
)
def test_errors_show_the_corrected_call(corpus, options, correction):
    with pytest.raises(ValueError, match=correction):
        TextData(**{"path": str(corpus), "sequence_length": 16, **options}).setup("fit")


@pytest.mark.parametrize(
    ("names", "correction"),
    [
        (["train.txt", "more.txt"], r"more.txt' names no split.*data_files=\{'train': 'more.txt'\}"),
        (["a.txt", "b.jsonl"], r"several kinds \(.jsonl, .txt\).*data_files"),
        (["a.pdf"], "no parquet, jsonl or txt files"),
        (["train-test.txt", "train.txt"], "several"),
    ],
    ids=str,
)
def test_unclear_folders_are_refused(tmp_path, names, correction):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=correction):
        TextData(str(tmp_path)).setup("fit")


def test_empty_split_is_refused(tmp_path):
    (tmp_path / "train.txt").write_text("some text")
    (tmp_path / "val.txt").write_text("")
    with pytest.raises(ValueError, match=r"no text in the split 'validation'.*data_files"):
        TextData(str(tmp_path), sequence_length=4).setup("fit")


def test_hub_names_are_explained_without_network(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"the hub did not give it.*path='/data/corpus'"):
        TextData("no-such-user/no-such-data").setup("fit")


def test_a_python_without_source_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=r"no source text.*TextData\(path="):
        StandardLibraryText().setup("fit")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data=StandardLibraryText", "--data.tokenizer=bpe-512", "--data.sequence_length=64"],
        ["--data=TextData", "--data.path=x", "--data.column=body", "--data.sequence_length=64", "--data.max_bytes=9"],
    ],
)
def test_command_line(arguments):
    assert "qlightning.data.text" in sys.modules
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    data = parser.instantiate(parser.parse_args(arguments)).data
    assert data.sequence_length == 64
    assert type(data).__name__ == arguments[0].split("=")[1]
    with pytest.raises(Exception, match="sequence_length"):
        parser.parse_args([*arguments, "--data.sequence_length=long"])
