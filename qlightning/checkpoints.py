"""Checkpoint files that are there whole or not at all, and are read only when they are what was written.

Lightning writes a checkpoint into the system's temporary folder and moves it: between two file systems that is a copy,
which a kill leaves half done under the checkpoint's own name, and nothing waits for the disk. `torch.load` does not
look at the checksums in the file it reads: a flipped bit is another weight. Here both are taken care of.
"""

import hashlib
import os
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from qlightning.folders import sync

_NOT_WHOLE = "{0} is no whole checkpoint ({1}): resume from another one, such as an earlier step of the same folder"


def write_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint under another name beside `path` and rename it when every byte has reached the disk.

    The other name follows from `path`: what a killed process left there is written over by whoever takes that step
    again. It ends in no suffix, so that nobody looking for checkpoints finds it.

    Args:
        checkpoint: What `torch.save` takes.
        path: Where it will be; the folder is made.

    Raises:
        OSError: It cannot be written: no room, no right. What was at `path` is still there.
    """
    path = Path(path).absolute()
    partial = path.parent / f".partial-{hashlib.sha256(path.name.encode()).hexdigest()[:12]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer, interrupted by the first, raises the second
        with suppress(OSError):
            partial.unlink()
        cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), None)
        if cause is None:
            raise
        kept = "; the checkpoint that was there is unharmed" if path.exists() else ""
        raise OSError(
            cause.errno, f"checkpoint {path} could not be written ({cause.strerror}){kept}: make room, or choose "
            "another folder, ModelCheckpoint(dirpath=...)"
        ) from error  # fmt: skip
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint with its tensors mapped from the file, not read. Nothing in the file is run.

    Raises:
        ValueError: There is no such file, it is not what was written, or it holds more than plain data and tensors.
    """
    check_whole(path)
    try:
        checkpoint = _load(path)
    except (pickle.UnpicklingError, RuntimeError) as error:
        why = str(error).split("WeightsUnpickler error: ")[-1].splitlines()[0]  # around it: how to read it all the same
        raise ValueError(f"{path} holds more than tensors and plain data, and is not read: {why}") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint


def strings_in(path: str | Path) -> Iterator[str]:
    """Every string in a checkpoint that may hold more than plain data, keys among them. Nothing in the file is run.

    Raises:
        ValueError: There is no such file, or it is not what was written.
    """
    check_whole(path)
    with zipfile.ZipFile(path) as records:
        pickled = next(name for name in records.namelist() if name.endswith("/data.pkl"))
        yield from (word for _, word, _ in pickletools.genops(records.read(pickled)) if isinstance(word, str))


def _load(path: str | Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        if "torchao.optim" not in str(error):
            raise
    import torchao.optim  # noqa: F401  (it says which of its tensors are plain data)

    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def check_whole(path: str | Path) -> None:
    """Read a checkpoint file once and compare every record with the checksum written beside it.

    Raises:
        ValueError: There is no such file, it was cut short, or something in it has changed since it was written.
    """
    if not os.path.isfile(path):
        raise ValueError(f"checkpoint {path} is not there")
    try:
        with zipfile.ZipFile(path) as records:
            broken = records.testzip()
    except Exception as error:  # whatever wrong numbers in the file lead the reader to: a wrong place, size or method
        raise ValueError(_NOT_WHOLE.format(path, error)) from None
    if broken is not None:
        raise ValueError(_NOT_WHOLE.format(path, f"{broken} is not what was written"))
