"""Checkpoint files: whole or not at all, and never another model than the one that was written."""

import io
import os
import zipfile

import pytest
import torch

from qlightning.checkpoints import check_whole, read_checkpoint, strings_in, write_checkpoint

CHECKPOINT = {"state_dict": {"w": torch.arange(64.0).view(8, 8) / 7}, "global_step": 3, "name": "abc"}


def same(read):
    return (
        read.keys() == CHECKPOINT.keys()
        and torch.equal(read["state_dict"]["w"], CHECKPOINT["state_dict"]["w"])
        and (read["global_step"], read["name"]) == (3, "abc")
    )


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "runs" / "last.ckpt"
    write_checkpoint(CHECKPOINT, path)
    write_checkpoint({**CHECKPOINT}, path)  # in place of the first
    assert same(read_checkpoint(path))
    assert same(torch.load(path))  # and by whoever does not know us
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_every_flipped_bit_is_found(tmp_path):
    """All over the file: what is read is what was written, or an error. torch.load lets many pass."""
    path, flipped = tmp_path / "whole.ckpt", tmp_path / "flipped.ckpt"
    write_checkpoint(CHECKPOINT, path)
    data, unnoticed, refused = path.read_bytes(), 0, 0
    for place in range(0, len(data), 7):
        wrong = bytearray(data)
        wrong[place] ^= 1 << (place * 5 % 8)
        flipped.write_bytes(wrong)
        try:
            assert same(read_checkpoint(flipped)), place
        except ValueError:
            refused += 1
            unnoticed += loads(bytes(wrong))
    assert refused > len(data) / 7 / 3
    assert unnoticed > 10


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def loads(data):
    try:
        return isinstance(torch.load(io.BytesIO(data)), dict)
    except Exception:  # whatever torch makes of it
        return False


@pytest.mark.parametrize("kept", [0, 1, 100, 0.3, 0.9, -1])
def test_a_file_that_was_cut_short(tmp_path, kept):
    path = tmp_path / "cut.ckpt"
    write_checkpoint(CHECKPOINT, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if 0 < kept < 1 else kept])
    with pytest.raises(ValueError, match=r"no whole checkpoint .* resume from another one"):
        read_checkpoint(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="is not there"):
        check_whole(tmp_path / "last.ckpt")


class Unfriendly:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-checkpoint",)


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Unfriendly()}, "stranger.ckpt")
    with pytest.raises(ValueError, match="more than tensors and plain data"):
        read_checkpoint("stranger.ckpt")
    assert not os.path.exists("made-by-a-checkpoint")


def test_the_strings_of_a_file_that_could_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"net.w": 1}, "thing": Unfriendly()}, "trusted.ckpt")
    assert {"state_dict", "net.w", "thing"} <= set(strings_in("trusted.ckpt"))
    assert not os.path.exists("made-by-a-checkpoint")
    torch.load("trusted.ckpt", weights_only=False)
    assert os.path.exists("made-by-a-checkpoint")


def test_a_file_of_something_else(tmp_path):
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="holds a list"):
        read_checkpoint(tmp_path / "list.ckpt")
    with zipfile.ZipFile(tmp_path / "zip.ckpt", "w") as file:
        file.writestr("readme", "hello")
    with pytest.raises(ValueError, match="is not read"):
        read_checkpoint(tmp_path / "zip.ckpt")


@pytest.mark.parametrize("large", [False, True], ids=["before", "larger-than-any-buffer"])
def test_a_full_disk(tmp_path, full_disk, large):
    path = tmp_path / "last.ckpt"
    write_checkpoint({"step": 1}, path)
    full = pytest.raises(OSError, match=r"could not be written \(File too large\); .* unharmed: make room")
    with full, full_disk():
        write_checkpoint({"step": 2, "w": torch.zeros(4_000_000 if large else 2_000)}, path)
    assert read_checkpoint(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_cannot_be_made(tmp_path):
    """Tests may run as root, whom no permission keeps out; a file where the folder should be keeps out everybody."""
    (tmp_path / "runs").write_text("")
    with pytest.raises(OSError, match=r"could not be written \(.*\): make room, or choose another folder"):
        write_checkpoint(CHECKPOINT, tmp_path / "runs" / "last.ckpt")


def test_interrupted_in_the_middle(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    write_checkpoint({"step": 1}, path)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint({"step": 2}, path)
    assert read_checkpoint(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
