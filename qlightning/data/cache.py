"""Results that take seconds to make (a trained tokenizer, token streams, decoded pictures), kept between runs.

They lie in `$QLIGHTNING_CACHE`, or in `qlightning` below `$XDG_CACHE_HOME` or `~/.cache`, under a name that holds a
hash of what they were made from: changed input makes a new entry, and the folder can be deleted at any time.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path


def fingerprint(*parts: str | bytes | Iterable[str | bytes]) -> str:
    """A hash of strings, bytes and sequences of them; where one part ends and the next begins counts.

    >>> fingerprint("ab", "c") == fingerprint("a", "bc")
    False
    """
    digest = hashlib.sha256()
    for part in parts:
        for piece in [part] if isinstance(part, str | bytes) else part:
            data = piece.encode() if isinstance(piece, str) else piece
            digest.update(len(data).to_bytes(8, "little") + data)
        digest.update(b"end of part")
    return digest.hexdigest()[:24]


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The file `name` of the cache folder; `make(path)` writes it where it is missing.

    Written beside and renamed, so that a killed run or a second process leaves no half file.
    """
    root = os.environ.get("QLIGHTNING_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "qlightning")
    path = Path(root).expanduser() / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{os.getpid()}-{path.name}")
        try:
            make(unfinished)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    return path
