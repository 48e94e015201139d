"""Sharded checkpoints: whole or not at all, on two processes, one of which may fail or be killed at any point."""

import json
import os
import pickle
import signal
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from qlightning import shards
from qlightning.shards import INDEX, REST, SUMS, check_shards, is_sharded, write_shards

pytestmark = [pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*fork")]

ROWS = 6


def states(value, rows=ROWS):
    """As a strategy gives them: rows over the processes, and a plain number."""
    whole = torch.arange(rows * 4.0).view(rows, 4) + value
    if dist.is_initialized():
        whole = distribute_tensor(whole, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])
    return {"state_dict": {"w": whole}, "optimizer_0": {"state": {"w": {"step": torch.tensor(value)}}}}


def write(value, path, **options):
    write_shards(states(float(value), **options), pickle.dumps({"step": value}), path)


def read(path, value):
    """Whether torch itself finds what `write(value, path)` wrote."""
    check_shards(path)
    found = {"state_dict": {"w": torch.zeros(ROWS, 4)}, "optimizer_0": {"state": {"w": {"step": torch.tensor(0.0)}}}}
    dcp.load(found, checkpoint_id=path, no_dist=True)
    step = found["optimizer_0"]["state"]["w"]["step"]
    wanted = torch.arange(ROWS * 4.0).view(ROWS, 4) + value
    rest = pickle.loads((path / REST).read_bytes())
    return torch.equal(found["state_dict"]["w"], wanted) and step == value and rest == {"step": value}


def test_written_by_two_and_read_by_torch(ranks, tmp_path):
    path = tmp_path / "runs" / "last.ckpt"

    def check():
        write(1, path)
        first = sorted(file.name for file in path.iterdir())
        dist.barrier()
        write(2, path)  # in place of the first
        return first

    for first in ranks(2, check):
        assert first == sorted([INDEX, "__0_0.distcp", "__1_0.distcp", SUMS, REST])
    assert is_sharded(path)
    assert read(path, 2)
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_full_disk_of_one_process(ranks, tmp_path, full_disk):
    """Both say which, and what was there stays."""
    path = tmp_path / "last.ckpt"

    def check():
        write(1, path)
        disk = full_disk() if dist.get_rank() == 1 else nullcontext()
        with pytest.raises(OSError, match="could not be written") as caught, disk:
            write(2, path, rows=10_000)
        dist.barrier()
        return str(caught.value)

    for said in ranks(2, check):
        assert "rank 1: File too large); the checkpoint that was there is unharmed: make room" in said
    assert read(path, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_parts_that_the_first_process_does_not_see(ranks, tmp_path):
    """Folders of machines of their own, say."""

    def check():
        if dist.get_rank() == 1:
            original = shards._Writer.write_data
            shards._Writer.write_data = lambda self, *args: [
                original(self, *args), (self.folder / "__1_0.distcp").unlink()
            ][0]  # fmt: skip
        with pytest.raises(OSError, match=r"__1_0.distcp of rank 1 cannot be seen .* that all processes see"):
            write(1, tmp_path / "last.ckpt")

    ranks(2, check)
    assert list(tmp_path.iterdir()) == []


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("rank", "at"),
    [
        (1, (shards._Writer.__mro__[1], "write_data")),
        (1, (shards, "fingerprint")),
        (0, (shards._Writer.__mro__[1], "finish")),
        (0, (json, "dumps")),
        (0, (shards, "put_in_place")),
    ],
    ids=["before-writing", "written", "before-the-index", "before-the-checksums", "before-its-name"],
)
def test_killed_in_the_middle(ranks, tmp_path, rank, at):
    path = tmp_path / "last.ckpt"

    def check():
        write(1, path)
        dist.barrier()
        if dist.get_rank() == rank:
            setattr(*at, die)
        write(2, path)

    ranks(2, check, dies=rank)
    assert read(path, 1)
    assert len(list(tmp_path.iterdir())) == 2
    write(3, path)  # who takes the step again
    assert read(path, 3)
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def written(tmp_path):
    write(1, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


@pytest.mark.parametrize("name", ["__0_0.distcp", INDEX, REST, SUMS])
def test_every_changed_file_is_found(written, name):
    """A flipped bit anywhere, a file cut short, or one that is missing. torch.load lets many flipped bits pass."""
    data = (written / name).read_bytes()
    for place in range(0, len(data), max(1, len(data) // 60)):
        wrong = bytearray(data)
        wrong[place] ^= 1 << (place * 5 % 8)
        (written / name).write_bytes(wrong)
        if name == SUMS:  # white space, say
            try:
                check_shards(written)
            except ValueError:
                continue
            assert json.loads(bytes(wrong)) == json.loads(data)
        else:
            with pytest.raises(ValueError, match=r"no whole checkpoint|no index of a checkpoint|leads out of|no name"):
                check_shards(written)
    (written / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="checkpoint"):
        check_shards(written)
    (written / name).write_bytes(data)
    assert read(written, 1)
    if name != SUMS:
        (written / name).unlink()
        with pytest.raises(ValueError, match=r"no whole checkpoint .*(missing|not what was written).* resume from"):
            check_shards(written)


def test_one_of_lightnings(tmp_path):
    """Has no checksums: what can be said of it is that its files are as long as its index says."""
    path = tmp_path / "last.ckpt"
    dcp.save(states(1.0), checkpoint_id=path, no_dist=True)
    (path / REST).write_bytes(pickle.dumps({"step": 1}))
    assert read(path, 1)
    part = path / "__0_0.distcp"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"__0_0.distcp is missing or not what was written\): resume from"):
        check_shards(path)


def test_work_is_shared_out(written):
    data = (written / "__0_0.distcp").read_bytes()
    (written / "__0_0.distcp").write_bytes(data[:-1] + b"\xff")
    refused = 0
    for rank in range(3):
        try:
            check_shards(written, rank=rank, ranks=3)
        except ValueError:
            refused += 1
    assert refused == 1
