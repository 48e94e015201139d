"""Text for language models: batches `{"input_ids": LongTensor (B, T)}`, inputs and targets in one: the task shifts.

Documents are joined to one stream and cut into windows of `sequence_length` that do not overlap; what is left over at
the end of the stream is dropped.
"""

import hashlib
import os
import sysconfig
from abc import abstractmethod
from collections.abc import Sequence
from fnmatch import fnmatch
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from qlightning.data.sources import load_rows
from qlightning.data.splits import TEST, TRAIN, VALIDATION, SplitData, hold_out
from qlightning.data.tokenizer import Tokenizer, load_tokenizer


class Windows(Dataset[dict[str, Tensor]]):
    """A stream of tokens cut into windows.

    Args:
        tokens: Shape (tokens,), any integer dtype.
        sequence_length: Tokens of a window.
    """

    def __init__(self, tokens: Tensor, sequence_length: int) -> None:
        self.tokens, self.sequence_length = tokens, sequence_length

    def __len__(self) -> int:
        return len(self.tokens) // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * self.sequence_length
        return {"input_ids": self.tokens[start : start + self.sequence_length].long()}


class TextSplits(SplitData):
    """Documents of three splits, tokenized and cut. A subclass says where the documents come from.

    Args:
        tokenizer: "bytes"; "bpe-N", trained on the training split; or a local folder or hub name for AutoTokenizer.
        sequence_length: Tokens of a window, T.
        batch_size: Windows in a batch, per process.
        seed: With the epoch it decides the order of the training windows.
        num_workers: Processes that read ahead. The windows lie in memory, where 0 is the fastest.
        separator: Text between two documents, for example "" where a document is a line. None: the tokenizer's end of
            text after each document, or a newline between two where it has none.
        max_bytes: At most so many bytes of the documents of each split.

    Raises:
        ValueError: An unknown tokenizer, an empty split, or too little text for one window.
    """

    def __init__(
        self,
        tokenizer: str = "bytes",
        *,
        sequence_length: int = 256,
        batch_size: int = 16,
        seed: int = 0,
        num_workers: int = 0,
        separator: str | None = None,
        max_bytes: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        for name, value in (("sequence_length", sequence_length), ("max_bytes", max_bytes)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} leaves no text; write for example {name}=1000")
        self._tokenizer_name, self.sequence_length = tokenizer, sequence_length
        self.separator, self.max_bytes = separator, max_bytes

    def prepare_data(self) -> None:
        """Fills the caches of data set and tokenizer in one process, before the others read them."""
        _ = self.read_documents(VALIDATION), self.tokenizer

    @abstractmethod
    def read_documents(self, split: str) -> list[str]:
        """All documents of one split, none where the split does not exist."""

    def documents(self, split: str) -> list[str]:
        """The documents of one split, up to `max_bytes`; a ValueError where there are none."""
        documents = self.read_documents(split)
        if not any(documents):
            raise ValueError(
                f"there is no text in the split {split!r}; name a file for it, for example "
                f"TextData(path='folder', data_files={{{split!r}: '*.parquet'}})"
            )
        return documents if self.max_bytes is None else _cut(documents, self.max_bytes)

    def read(self, split: str) -> Windows:
        """The windows of one split."""
        tokens = self.tokenizer.encode(self.documents(split), self._separator)
        if len(tokens) < self.sequence_length:
            raise ValueError(
                f"the split {split!r} has {len(tokens)} tokens, fewer than sequence_length={self.sequence_length}; "
                f"write sequence_length={len(tokens)} or less, or give more text"
            )
        return Windows(tokens, self.sequence_length)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Encodes and decodes; "bpe-N" is trained on the training split, up to `max_bytes`."""
        return load_tokenizer(self._tokenizer_name, lambda: self.documents(TRAIN))

    @property
    def vocab_size(self) -> int:
        """Number of token numbers."""
        return self.tokenizer.vocab_size

    @cached_property
    def bytes_per_token(self) -> float:
        """Bytes of UTF-8 per token of the validation split: nats per token divided by it are nats per byte.

        An end-of-text token counts as a token of no bytes, a text between documents with its bytes.
        """
        windows, documents = self.dataset(VALIDATION), self.documents(VALIDATION)
        assert isinstance(windows, Windows)
        joints = len((self._separator or "").encode()) * (len(documents) - 1)
        return (sum(len(document.encode()) for document in documents) + joints) / len(windows.tokens)

    @property
    def _separator(self) -> str | None:
        return "\n" if self.separator is None and self.tokenizer.end is None else self.separator


class TextData(TextSplits):
    """Text of a hub data set, or of local parquet, jsonl or txt files; a row (or a whole .txt file) is a document.

    Where no validation split exists, validation and, if it is missing too, test are held out of train by document; a
    corpus of one or two documents is cut at line ends instead, its last parts held out.

    Args:
        path: Name of a hub data set, or a local folder or file.
        tokenizer: "bytes"; "bpe-N", trained on the training split; or a local folder or hub name for AutoTokenizer.
        column: Column that holds the text.
        subset: Configuration of a hub data set, such as "wikitext-2-raw-v1".
        data_files: Split name ("train", "validation", "test") to file name or glob pattern below `path`. None: told by
            the file names.
        held_out: Share of each split that has to be held out of train.
        **options: Those of `TextSplits`: sequence_length, batch_size, seed, num_workers, separator, max_bytes.

    Raises:
        ValueError: A missing path, column or split, an unknown tokenizer, or too little text for one window.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str = "bytes",
        *,
        column: str = "text",
        subset: str | None = None,
        data_files: dict[str, str] | None = None,
        held_out: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, **options)
        self.path, self.column, self.subset = path, column, subset
        self.data_files, self.held_out = data_files, held_out

    def read_documents(self, split: str) -> list[str]:
        """All documents of one split, none where the split does not exist."""
        return self._splits.get(split, [])

    @cached_property
    def _splits(self) -> dict[str, list[str]]:
        rows = load_rows(self.path, subset=self.subset, data_files=self.data_files)
        splits = {}
        for split, table in rows.items():
            if self.column not in table.column_names:
                raise ValueError(
                    f"{self.path!r} has no column {self.column!r} but {', '.join(table.column_names)}; write for "
                    f"example TextData({self.path!r}, column={table.column_names[0]!r})"
                )
            splits[split] = [text or "" for text in table[self.column]]
        if TRAIN in splits and VALIDATION not in splits:
            parts = [split for split in (VALIDATION, TEST) if split not in splits]
            splits |= _share(splits[TRAIN], self.held_out, parts)
        return splits


def _share(documents: Sequence[str], fraction: float, parts: Sequence[str]) -> dict[str, list[str]]:
    if len(documents) > len(parts):
        shares = hold_out(len(documents), fraction, parts)
        return {part: [documents[i] for i in indices] for part, indices in shares.items()}
    # Too few documents to hold one out: their lines are the units, and the parts follow one another.
    lines = "".join(documents).splitlines(keepends=True)
    sizes = {part: len(indices) for part, indices in hold_out(len(lines), fraction, parts).items()}
    rest = iter(lines)
    return {part: ["".join(islice(rest, sizes[part]))] for part in (TRAIN, *parts)}


def _cut(documents: Sequence[str], max_bytes: int) -> list[str]:
    kept, left = [], max_bytes
    for document in documents:
        data = document.encode()
        kept.append(data[:left].decode(errors="ignore"))  # a character cut in two is left out
        left -= len(data)
        if left <= 0:
            break
    return kept


# No source of the library, generated, of one machine, or left out by some distributions: the text should be the same
# everywhere.
_LEFT_OUT = (
    "test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data",
    "turtledemo", "tkinter", "distutils", "ensurepip", "venv", "__pycache__", "sitecustomize.py", "config-*",
    "_sysconfigdata*",
)  # fmt: skip
_TWENTIETHS = (VALIDATION, TEST, *[TRAIN] * 18)


class StandardLibraryText(TextSplits):
    """The source text of the running Python's standard library: a corpus on every machine, with nothing to download.

    A file is a document. About 90 % of the files are train, 5 % validation, 5 % test, by a hash of the path below the
    library folder, so that a file is in the same split on every machine.
    """

    def read_documents(self, split: str) -> list[str]:
        """The text of the files of one split, in the order of the hashes of their paths."""
        return [path.read_text(encoding="utf-8") for path in self.files(split)]

    def files(self, split: str) -> list[Path]:
        """The files of one split, in the order of the hashes of their paths."""
        return [path for digest, path in self._placed if _TWENTIETHS[digest[-1] * 20 // 256] == split]

    @cached_property
    def _placed(self) -> list[tuple[bytes, Path]]:
        root = sysconfig.get_paths()["stdlib"]
        paths = []
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if _belongs(name)]  # site-packages can be large: do not enter it
            paths += [Path(folder, name) for name in files if name.endswith(".py") and _belongs(name)]
        if not paths:
            raise ValueError(f"this Python has no source text below {root!r}; write TextData(path='...') instead")
        return sorted((hashlib.sha256(path.relative_to(root).as_posix().encode()).digest(), path) for path in paths)


def _belongs(name: str) -> bool:
    return not any(fnmatch(name, pattern) for pattern in _LEFT_OUT)
