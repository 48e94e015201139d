"""Folders that get their names at once."""

import errno
import os

import pytest

from qlightning import folders
from qlightning.folders import aside_of, clear_leftovers, fingerprint, no_room, put_in_place


def folder(path, text):
    path.mkdir()
    (path / "a").write_text(text)
    return path


def test_something_is_always_there(tmp_path, monkeypatch):
    """Between any two calls of the system."""
    place = folder(tmp_path / "place", "old")
    seen = []
    for name in ("sync", "_remove"):
        original = getattr(folders, name)
        monkeypatch.setattr(
            folders, name, lambda path, do=original: (seen.append((place / "a").read_text()), do(path))[1]
        )
    put_in_place(folder(tmp_path / "new", "new"), place)
    assert set(seen) == {"old", "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_in_place_of_a_file(tmp_path, monkeypatch, exchanges):
    """A checkpoint of one file, where shards are written now."""
    if not exchanges:
        monkeypatch.setattr(folders, "_exchange", lambda *names: False)
    (tmp_path / "place").write_text("file")
    put_in_place(folder(tmp_path / "new", "new"), tmp_path / "place")
    assert (tmp_path / "place" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_leftovers(tmp_path):
    """An old one that stands aside goes back where nothing is, and away where something is."""
    new = folder(tmp_path / ".p-1", "new")
    folder(aside_of(new), "old")
    (tmp_path / ".p-file").write_text("not a folder")
    (tmp_path / ".p-link").symlink_to(tmp_path)
    clear_leftovers(tmp_path / "p", ".p-*")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".p-file", ".p-link", "p"]
    assert (tmp_path / "p" / "a").read_text() == "old"
    folder(aside_of(new), "older")
    clear_leftovers(tmp_path / "p", ".p-*")
    assert (tmp_path / "p" / "a").read_text() == "old"
    assert not aside_of(new).exists()


def test_fingerprint(tmp_path):
    (tmp_path / "a").write_text("x")
    assert fingerprint(tmp_path / "a") == {
        "bytes": 1,
        "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881",
    }


def test_a_full_disk_by_any_name():
    """As Python says it, and as libraries in other languages do."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")
    assert no_room(full) is full
    for words in ("I/O error: No space left on device (os error 28)", "os error 27", "9 requested and 0 written"):
        found = no_room(RuntimeError(words))
        assert found is not None
        assert found.errno in (errno.ENOSPC, errno.EFBIG)
    wrapped = RuntimeError("unexpected pos 64 vs 0")
    wrapped.__context__ = full
    assert no_room(wrapped) is full
    assert no_room(OSError(errno.EACCES, "no right")) is None
    assert no_room(ValueError("other")) is None
