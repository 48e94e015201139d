"""Folders that get their names at once: filled beside the place where they will be, and put there when they are whole.

Artifacts (`export/artifact.py`) and sharded checkpoints (`shards.py`) are such folders. A process that is killed leaves
the place as it was, and beside it at most a hidden folder, which whoever writes there next takes away.
"""

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_ASIDE = ".old"
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV}
_FULL = {errno.ENOSPC: "No space left on device", errno.EDQUOT: "Disk quota exceeded", errno.EFBIG: "File too large"}


def put_in_place(folder: Path, place: Path) -> None:
    """Give a folder its name, at once: at no time is nothing there, where the system can exchange two names.

    Linux can, on its own file systems. Elsewhere what is at `place` steps aside first, as `aside_of(folder)`, and a
    kill in between leaves it there; `clear_leftovers` puts it back.

    Args:
        folder: What will be at `place`, on the same file system.
        place: Its name to be; a file or folder that is there is removed.
    """
    to_disk(folder)
    if not os.path.lexists(place):
        folder.rename(place)
    elif _exchange(folder, place):
        _remove(folder)
    else:
        aside = aside_of(folder)
        place.rename(aside)
        folder.rename(place)
        _remove(aside)
    sync(place.parent)


def aside_of(folder: Path) -> Path:
    """Where something waits while `folder` takes its place."""
    return folder.with_name(folder.name + _ASIDE)


def _exchange(first: Path, second: Path) -> bool:
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or one of before 2018
        return False
    if not rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE):
        return True
    if (code := ctypes.get_errno()) in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _remove(path: Path) -> None:
    """What nobody needs any more; what cannot be removed now is taken away by the next who writes there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Marks a folder as one that a living process fills: the system takes the mark away when the process ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without such marks: then no leftovers are recognized
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def clear_leftovers(place: Path, pattern: str) -> None:
    """Remove what killed processes left beside `place`, and put back what one of them had moved aside.

    Args:
        place: The folder that they would have written.
        pattern: Of the names under which folders are filled beside it; those that a living process fills stay.
    """
    for folder in sorted(place.parent.glob(pattern)):
        if not folder.is_dir() or folder.is_symlink() or not _abandoned(folder):
            continue
        if folder.suffix == _ASIDE and not os.path.lexists(place):
            folder.rename(place)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _abandoned(folder: Path) -> bool:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(handle)


def to_disk(folder: Path) -> None:
    """Wait until everything in a folder has reached the disk."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, read from the disk."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, which must lie in the folder.

    Raises:
        ValueError: The name is absolute or leads out of the folder.
    """
    try:
        path = (folder / name).resolve()
        path.is_file()
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # names no file can have, links in a circle
        raise ValueError(f"{name!r} is no name of a file: {error}") from None
    if not path.is_relative_to(folder.resolve()) or path == folder.resolve():
        raise ValueError(f"{name!r} leads out of {folder}: what is written has only names of files in its own folder")
    return path


def no_room(error: BaseException) -> OSError | None:
    """The error of a full disk behind an error, or None: libraries in other languages say it in words of their own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen if seen.errno in _FULL else None
        for code, words in _FULL.items():
            if words.lower() in str(seen).lower() or f"os error {code}" in str(seen).lower():
                return OSError(code, words)
        if re.fullmatch(r"\d+ requested and \d+ written", str(seen)):  # numpy, which does not say why
            return OSError(errno.ENOSPC, "a file is not all written")
        seen = seen.__cause__ or seen.__context__
    return None
