"""The files of an export: a folder that is there whole or not at all, of safetensors and JSON.

A folder is filled under another name beside its own and renamed when every file has reached the disk. The manifest,
`qlightning.json`, is written last and lists all files with their sizes and SHA-256: a folder without it, or with other
files than it says, is not whole.
"""

import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlightning.folders import at_work, clear_leftovers, fingerprint, inside, no_room, put_in_place

MANIFEST = "qlightning.json"

_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    **{torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
    torch.float8_e8m0fnu: "F8_E8M0",
}


@contextmanager
def publish(out: Path, *, force: bool = False) -> Iterator[Path]:
    """A new folder that becomes `out` when the block ends well and vanishes when it does not.

    Args:
        out: The folder to be; its parent is made.
        force: Replace an earlier export there.

    Raises:
        ValueError: There is something at `out`, and `force` is off or what is there is no export.
        OSError: No room; what was at `out` is still there.
    """
    out = out.absolute()
    check_free(out, force=force)
    folder = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(out, f".{glob.escape(out.name)}.partial-*")
        check_free(out, force=force)  # an earlier export may be back
        folder.mkdir()
        with at_work(folder):
            yield folder
            check_free(out, force=force)  # once more: it may have come while the folder was filled
            put_in_place(folder, out)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if (full := no_room(error)) is None:
            raise
        kept = "; what was there is unharmed" if out.exists() else ""
        raise OSError(
            full.errno, f"{out} could not be written ({full.strerror}){kept}: make room, or choose another folder"
        ) from error


def check_free(out: Path, *, force: bool) -> None:
    """Raise ValueError if there is something at `out`, and `force` is off or what is there is no export."""
    if not os.path.lexists(out):
        return
    ours = out.is_dir() and not out.is_symlink() and ((out / MANIFEST).is_file() or not any(out.iterdir()))
    if not force:
        how = "write force=True (--force) to replace it" if ours else "choose another folder"
        raise ValueError(f"{out} exists already: {how}")
    if not ours:
        raise ValueError(f"{out} is no export of qlightning (no {MANIFEST} in it), so it is not replaced: move it away")


# --- the manifest ---


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `facts` and what files there are. Call it last."""
    (folder / MANIFEST).unlink(missing_ok=True)
    files = {path.relative_to(folder).as_posix(): fingerprint(path) for path in folder.rglob("*") if path.is_file()}
    known = json.loads(json.dumps({**facts, "files": dict(sorted(files.items()))}))
    known.pop("sha256", None)  # of facts that were read
    text = json.dumps({**known, "sha256": _digest(known)}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a whole export, every file of which has been read and is what was written.

    Raises:
        ValueError: There is none, a file is missing or has changed, or a name leads out of the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is no whole export of qlightning: it has no {MANIFEST}")
    facts = read_json(path)
    files, digest = facts.get("files"), facts.pop("sha256", None)
    if not isinstance(files, dict) or digest != _digest(facts):
        raise ValueError(f"{path} is not what was written; export again")
    for name, written in files.items():
        if not (file := inside(folder, name)).is_file() or fingerprint(file) != written:
            raise ValueError(f"{folder} is not whole: {name} is missing or not what was written; export again")
    return facts


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds names and values.

    Raises:
        ValueError: It holds something else, or is no JSON.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of which those of JSON and of UTF-8 are
        raise ValueError(f"{path} is no JSON file ({error}); export again") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{path} holds a {type(facts).__name__} where names and values should be; export again")
    return facts


# --- safetensors ---


class Shards:
    """Safetensors files that are written tensor by tensor, so that no more than one need be in memory.

    The format has its header first and wants tensors aligned, so data goes to side files, one per item size, which are
    joined when a shard is full.

    Args:
        folder: Where to write.
        stem: Name of the file without its ending; of several, they are numbered and an index names the file of each
            tensor, as transformers does.
        shard_bytes: A new file begins where one would grow beyond this.
    """

    def __init__(self, folder: Path, *, stem: str = "model", shard_bytes: int = 5 * 10**9) -> None:
        self.folder, self.stem, self.shard_bytes = folder, stem, shard_bytes
        self.written: dict[str, int] = {}
        self._shards: list[dict[str, Any]] = []
        self._sizes: list[int] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor.

        Raises:
            ValueError: The name was written already, or the dtype has no place in safetensors.
        """
        if name in self.written:
            raise ValueError(f"tensor {name!r} is written twice")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"tensor {name!r} is {tensor.dtype}, which safetensors does not hold")
        size = tensor.numel() * tensor.element_size()
        if not self._shards or self._sizes[-1] + size > self.shard_bytes:
            self._shards.append({})
            self._sizes.append(0)
        number = len(self._shards) - 1
        with self._side(number, tensor.element_size()).open("ab") as file:
            begin = file.tell()
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._shards[-1][name] = (_DTYPES[tensor.dtype], list(tensor.shape), tensor.element_size(), begin, size)
        self._sizes[-1] += size
        self.written[name] = number

    def close(self, metadata: Mapping[str, str] | None = None) -> list[str]:
        """Join the files and write the index. Returns the names of the files.

        Args:
            metadata: Goes into every file's header.
        """
        count = len(self._shards)
        names = [
            f"{self.stem}.safetensors" if count == 1 else f"{self.stem}-{i + 1:05}-of-{count:05}.safetensors"
            for i in range(count)
        ]
        for number, name in enumerate(names):
            self._join(number, self.folder / name, {"format": "pt", **(metadata or {})})
        if count > 1:
            index = {
                "metadata": {"total_size": sum(self._sizes)},
                "weight_map": {tensor: names[number] for tensor, number in self.written.items()},
            }
            text = json.dumps(index, indent=2, sort_keys=True)
            (self.folder / f"{self.stem}.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
        return names

    def _side(self, number: int, item: int) -> Path:
        return self.folder / f"{self.stem}.{number}.{item}.data"

    def _join(self, number: int, path: Path, metadata: Mapping[str, str]) -> None:
        start, offsets = 0, {}
        sides = [(item, self._side(number, item)) for item in (8, 4, 2, 1)]
        for item, side in sides:  # wide items first, so that all are aligned
            offsets[item] = start
            start += side.stat().st_size if side.exists() else 0
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        for name, (dtype, shape, item, begin, size) in self._shards[number].items():
            begin += offsets[item]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, side in sides:
                if side.exists():
                    with side.open("rb") as data:
                        shutil.copyfileobj(data, file, 1 << 24)
                    side.unlink()


def read_tensors(folder: Path, *, stem: str = "model") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of an artifact's safetensors files, one at a time.

    Raises:
        ValueError: There are none, one is damaged, or the index names a file outside of the folder.
    """
    for file in _files(folder, stem):
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                yield name, opened.get_tensor(name)


def read_metadata(folder: Path, *, stem: str = "model") -> dict[str, str]:
    """The metadata in the headers of an artifact's safetensors files."""
    metadata: dict[str, str] = {}
    for file in _files(folder, stem):
        with _opened(file) as opened:
            metadata.update(opened.metadata() or {})
    return metadata


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file} is not what was written ({error}); export again") from None


def _files(folder: Path, stem: str) -> list[Path]:
    index = folder / f"{stem}.safetensors.index.json"
    named: Any = [f"{stem}.safetensors"]
    if index.is_file():
        places = read_json(index).get("weight_map")
        named = list(places.values()) if isinstance(places, dict) else [None]
        if not all(isinstance(name, str) for name in named):
            raise ValueError(f"{index} does not say which file has which tensor; export again")
    files = [inside(folder, name) for name in sorted(set(named))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{folder} has no {missing[0]}")
    return files
