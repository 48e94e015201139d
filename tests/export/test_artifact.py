"""An artifact is there whole or not at all, and its files are what safetensors itself reads."""

import hashlib
import json
import os
import shutil
import signal
from contextlib import suppress

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qlightning import folders
from qlightning.export.artifact import MANIFEST, Shards, inside, publish, read_manifest, read_tensors, write_manifest

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
]


def tensors():
    """Of every dtype, odd sizes first, so that a writer that does not order them would misalign the rest."""
    made = {}
    for i, dtype in enumerate(reversed(DTYPES)):
        raw = torch.randint(256, (3 * (i + 1) * dtype.itemsize,), dtype=torch.uint8)
        made[f"t{i}"] = raw.bool().view(-1, 3) if dtype is torch.bool else raw.view(dtype).view(-1, 3)
    return {
        **made,
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "strided": torch.arange(6.0).view(2, 3).t(),
    }


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(x):
    return x.contiguous().reshape(-1).view(torch.uint8)


def test_safetensors_reads_what_is_streamed(tmp_path):
    shards, wanted = Shards(tmp_path), tensors()
    for name, tensor in wanted.items():
        shards.add(name, tensor)
    assert shards.close({"who": "me"}) == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == wanted.keys()
    assert all(same(read[name], tensor) for name, tensor in wanted.items())
    with safe_open(str(tmp_path / "model.safetensors"), framework="pt") as file:
        assert file.metadata() == {"format": "pt", "who": "me"}


def test_shards_and_their_index(tmp_path):
    shards = Shards(tmp_path, stem="big", shard_bytes=100)
    wanted = {f"layers.{i}": torch.randn(10 + i) for i in range(5)}
    for name, tensor in wanted.items():
        shards.add(name, tensor)
    files = shards.close()
    assert files == [f"big-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "big.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(range(10, 15))
    for name, tensor in wanted.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)
    assert {name for name, _ in read_tensors(tmp_path, stem="big")} == set(wanted)


def test_what_cannot_be_written(tmp_path):
    shards = Shards(tmp_path)
    shards.add("a", torch.ones(1))
    with pytest.raises(ValueError, match="'a' is written twice"):
        shards.add("a", torch.ones(1))
    with pytest.raises(ValueError, match="complex64, which safetensors does not hold"):
        shards.add("b", torch.ones(1, dtype=torch.complex64))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/../../b", ".", ""])
def test_names_stay_in_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="leads out of"):
        inside(tmp_path, name)
    index = {"metadata": {}, "weight_map": {"a": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="leads out of"):
        list(read_tensors(tmp_path))


def write(folder, text="x"):
    (folder / "sub").mkdir()
    (folder / "sub" / "a.json").write_text(text)
    write_manifest(folder, {"format": "plain"})


def test_published_when_all_is_well(tmp_path):
    out = tmp_path / "deep" / "out"
    with publish(out) as folder:
        write(folder)
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    facts = read_manifest(out)
    assert facts["format"] == "plain"
    assert facts["files"] == {"sub/a.json": {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}


def test_nothing_is_left_after_an_error(tmp_path):
    def fail():
        with publish(tmp_path / "out") as folder:
            write(folder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("files", [0, 1, 2])
def test_killed_between_files_nothing_looks_whole(tmp_path, files):
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        with publish(out) as folder:
            for i in range(files):
                (folder / f"model-{i}.safetensors").write_text("x")
            os._exit(9)  # as if killed: no cleaning up
    os.waitpid(child, 0)
    assert not out.exists()
    (left,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match="no whole export"):
        read_manifest(left)
    with publish(out) as folder:
        write(folder)
    assert read_manifest(out)


def test_an_existing_folder_is_kept(tmp_path):
    out = tmp_path / "out"
    with publish(out) as folder:
        write(folder, "first")
    with pytest.raises(ValueError, match="exists already: write force=True"), publish(out):
        pytest.fail("entered")
    with publish(out, force=True) as folder:
        write(folder, "second")
    assert (out / "sub" / "a.json").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_nothing_but_exports(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    (tmp_path / "file").write_text("x")
    for name in ("home", "link", "file"):
        with pytest.raises(ValueError, match="no export of qlightning"), publish(tmp_path / name, force=True):
            pytest.fail("entered")
        with pytest.raises(ValueError, match="choose another folder"), publish(tmp_path / name):
            pytest.fail("entered")
    assert (tmp_path / "home" / "thesis.txt").exists()


def test_a_folder_that_lost_something_is_not_whole(tmp_path):
    write(tmp_path)
    assert read_manifest(tmp_path)
    for wrong in ("longer", "y", None):
        file = tmp_path / "sub" / "a.json"
        file.unlink() if wrong is None else file.write_text(wrong)
        with pytest.raises(ValueError, match=r"not whole: sub/a.json is missing or not what was written"):
            read_manifest(tmp_path)


def test_every_flipped_bit_is_found(tmp_path):
    """In the tensors and in the manifest itself."""
    shards = Shards(tmp_path)
    shards.add("w", torch.arange(6.0))
    shards.close()
    write_manifest(tmp_path, {"format": "plain", "proof": {"sqnr_db": 41.25, "passed": True}})
    facts = read_manifest(tmp_path)
    for name in ("model.safetensors", MANIFEST):
        data = (tmp_path / name).read_bytes()
        for place in range(len(data)):
            wrong = bytearray(data)
            wrong[place] ^= 1 << (place * 5 % 8)
            (tmp_path / name).write_bytes(wrong)
            try:
                assert read_manifest(tmp_path) == facts, place  # white space, say
            except ValueError:
                continue
            assert name == MANIFEST
        (tmp_path / name).write_bytes(data)


def forged(folder, files):
    """A manifest that fits itself, as someone with bad intentions would write it."""
    from qlightning.export import artifact

    facts = {"format": "plain", "files": files}
    (folder / MANIFEST).write_text(json.dumps({**facts, "sha256": artifact._digest(facts)}))


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "sub/../../x", "..", ".", "", "link", "loop", "a\0b", "n" * 5000]
)
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "x").write_text("secret")
    (tmp_path / "out" / "link").symlink_to(tmp_path / "x")
    (tmp_path / "out" / "loop").symlink_to(tmp_path / "out" / "loop")
    forged(tmp_path / "out", {name: {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}})
    with pytest.raises(ValueError, match=r"leads out of|no name of a file|missing or not what was written"):
        read_manifest(tmp_path / "out")
    index = {"weight_map": {"w": name}}
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"leads out of|no name of a file|has no"):
        list(read_tensors(tmp_path / "out"))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "null", "\ud800", '{"files": 3}', '{"weight_map": [1]}', '{"weight_map": {"w": 1}}', "[" * 100_000],
    ids=range(9),
)
def test_json_that_says_something_else(tmp_path, text):
    data = text.encode("utf-8", "surrogatepass")
    (tmp_path / MANIFEST).write_bytes(data)
    (tmp_path / "model.safetensors.index.json").write_bytes(data)
    with pytest.raises(ValueError, match="export again"):
        read_manifest(tmp_path)
    with pytest.raises(ValueError, match="export again"):
        list(read_tensors(tmp_path))


@pytest.mark.parametrize("kept", [0, 7, 30, -1])
def test_tensors_that_were_cut_short(tmp_path, kept):
    shards = Shards(tmp_path)
    shards.add("w", torch.arange(6.0))
    (name,) = shards.close()
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:kept])
    with pytest.raises(ValueError, match="not what was written"):
        list(read_tensors(tmp_path))


def killed_at(name, out, *, force=True):
    """A process publishes and is killed when it calls a function of `folders`."""
    child = os.fork()
    if child == 0:
        setattr(folders, name, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
        with publish(out, force=force) as folder:
            write(folder, "second")
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchanged", "moved-aside"])
@pytest.mark.parametrize("at", ["to_disk", "_remove"])
def test_killed_while_it_replaces(tmp_path, monkeypatch, at, exchanges):
    """The old export or the new one is there, whole, and the next export takes away what lies beside it."""
    if not exchanges:
        monkeypatch.setattr(folders, "_exchange", lambda *names: False)
    out = tmp_path / "out"
    with publish(out) as folder:
        write(folder, "first")
    killed_at(at, out)
    assert (out / "sub" / "a.json").read_text() == ("first" if at == "to_disk" else "second")
    assert read_manifest(out)
    assert len(list(tmp_path.iterdir())) == 2
    with publish(out, force=True) as folder:
        write(folder, "third")
    assert (out / "sub" / "a.json").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_where_nothing_is_exchanged(tmp_path, monkeypatch):
    """The one moment in which there is nothing at `out`: the next export begins by putting the old one back."""
    monkeypatch.setattr(folders, "_exchange", lambda *names: False)
    out = tmp_path / "out"
    with publish(out) as folder:
        write(folder, "first")
    with publish(tmp_path / ".out.partial-00.old") as folder:
        write(folder, "first")
    shutil.rmtree(out)
    with pytest.raises(ValueError, match="exists already"), publish(out):
        pytest.fail("entered")
    assert read_manifest(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_others_fill_is_left_to_them(tmp_path):
    out = tmp_path / "out"
    with publish(out) as first:
        with publish(out) as second:
            write(second, "second")
        write(first, "first")
        (first / "more").write_text("x")
        write_manifest(first, {})
        shutil.rmtree(out)
    assert (out / "sub" / "a.json").read_text() == "first"
    assert (out / "more").exists()


def test_a_disk_that_is_full_at_any_moment(tmp_path, full_disk):
    """Of tensors that are streamed, joined and listed: all or nothing."""
    out, failed = tmp_path / "out", 0

    def export():
        with publish(out) as folder:
            shards = Shards(folder)
            for name, tensor in tensors().items():
                shards.add(name, tensor)
            shards.close()
            write_manifest(folder, {"format": "plain"})

    for room in range(0, 3000, 90):
        with full_disk(room), suppress(OSError):
            export()
        if out.exists():
            assert dict(read_tensors(out)).keys() == tensors().keys()
            assert read_manifest(out)
            shutil.rmtree(out)
        else:
            assert list(tmp_path.iterdir()) == []
            with full_disk(room), pytest.raises(OSError, match=r"written \(File too large\): make room"):
                export()
            failed += 1
    assert 10 < failed < 33
