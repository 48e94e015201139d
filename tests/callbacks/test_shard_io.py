"""Sharded checkpoints of a Trainer on two processes: at once and in the background, read, refused, killed."""

import os
import shutil
import signal
from datetime import timedelta

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed as dist
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.fsdp import FSDPModule, fully_shard

from qlightning import BackgroundCheckpoints, QATCallback, QuantizedFSDP, WholeCheckpoints, shards
from qlightning.cli import interface
from qlightning.export.sharded import read_sharded
from qlightning.layers.convert import quantizers_of
from qlightning.shards import SUMS, check_shards, read_index

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*dirpath has changed", "ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*no last checkpoint", "ignore:Be aware that when using .ckpt_path."),
]


def net(kit, own=False):
    """The kit's module; with `own`, a user's own sharding in configure_model."""

    class Net(kit.Net):
        def __init__(self):
            super().__init__()
            self.losses = []

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.losses.append(float(loss.detach()))
            return loss

    class Own(Net):
        def configure_model(self):
            if not isinstance(self.net, FSDPModule):
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    return Own() if own else Net()


def fit(kit, folder, *, steps=4, io=None, module=None, own=False, ckpt_path=None, **save):
    """Saves a folder at every step unless told otherwise; returns the losses."""
    module = module or net(kit, own)
    size = dist.get_world_size()
    strategy = ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1) if own else QuantizedFSDP()
    save = ModelCheckpoint(folder, **{"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}", **save})
    options = {"strategy": strategy, "devices": size, "max_steps": steps, "plugins": [io] if io else []}
    options |= {"limit_val_batches": 0}
    kit.fit(module, QATCallback("int4-channel-lsq"), save, ckpt_path=ckpt_path, **options)
    return module.losses


@pytest.mark.parametrize("own", [False, True], ids=["QuantizedFSDP", "fully_shard"])
def test_in_the_background_as_at_once(ranks, kit, own):
    """The same checkpoints, from each of which a run goes on bit for bit."""

    def check():
        losses = fit(kit, kit.folder / "background", io=BackgroundCheckpoints(), own=own)
        at_once = fit(kit, kit.folder / "at-once", own=own)
        path = kit.folder / "background" / "step=2.ckpt"
        return losses, at_once, fit(kit, kit.folder / "more", own=own, ckpt_path=path)

    for losses, at_once, rest in ranks(2, check):
        assert losses == at_once
        assert rest == losses[2:]
    for name in ("background", "at-once"):
        assert {path.name for path in (kit.folder / name).iterdir()} == {f"step={n}.ckpt" for n in range(1, 5)}
    for n in range(1, 5):
        there = [kit.folder / name / f"step={n}.ckpt" for name in ("background", "at-once")]
        check_shards(there[0])
        assert (there[0] / SUMS).exists()
        for part in ("__0_0.distcp", "__1_0.distcp"):
            assert (there[0] / part).read_bytes() == (there[1] / part).read_bytes()


def test_the_old_one_stays_until_the_new_one_is_there(ranks, kit):
    folder = kit.folder / "run"

    def check():
        seen = []
        put = shards.put_in_place

        def look(new, place):
            seen.append(sorted(path.name for path in folder.iterdir() if path.name[0] != "."))
            put(new, place)

        shards.put_in_place = look
        fit(kit, folder, io=BackgroundCheckpoints(), save_top_k=1, steps=3)
        return seen

    first, _ = ranks(2, check)
    assert first == [[], ["step=1.ckpt"], ["step=2.ckpt"]]
    assert [path.name for path in folder.iterdir()] == ["step=3.ckpt"]


@pytest.mark.parametrize("at", [2, 4], ids=["next-save", "end-of-fit"])
def test_a_failure_of_one_is_raised_in_all(ranks, kit, at):
    folder = kit.folder / "run"

    def check():
        write, calls = FileSystemWriter.__mro__[1].write_data, []

        def fail(self, *args):
            calls.append(1)
            if dist.get_rank() == 1 and len(calls) == at:
                raise OSError(28, "No space left on device")
            return write(self, *args)

        FileSystemWriter.__mro__[1].write_data = fail
        module = net(kit)
        with pytest.raises(OSError, match=r"rank 1: No space left on device\): make room"):
            fit(kit, folder, module=module, io=BackgroundCheckpoints())
        return len(module.losses)

    assert ranks(2, check) == [min(at + 1, 4)] * 2
    assert {path.name for path in folder.iterdir()} == {f"step={n}.ckpt" for n in range(1, at)}


@pytest.mark.parametrize(("rank", "name"), [(0, "put_in_place"), (1, "fingerprint")])
@pytest.mark.parametrize("io", [BackgroundCheckpoints, WholeCheckpoints])
def test_killed_while_saving(ranks, kit, io, rank, name):
    """`last.ckpt` is what it was before, and the run that goes on from it is the run that was not killed."""
    last = {"save_last": True, "save_top_k": 0, "enable_version_counter": False, "every_n_train_steps": 2}

    def killed():
        if dist.get_rank() == rank:
            original, calls = getattr(shards, name), []

            def die(*args):
                calls.append(1)
                if len(calls) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args)

            setattr(shards, name, die)
        fit(kit, kit.folder / "run", io=io(), steps=6, **last)

    ranks(2, killed, dies=rank)
    check_shards(kit.folder / "run" / "last.ckpt")

    def check():
        rest = fit(kit, kit.folder / "run", io=io(), steps=6, ckpt_path="last", **last)
        return rest, fit(kit, kit.folder / "other", steps=6)

    for rest, losses in ranks(2, check):
        assert rest == losses[2:]
    assert [path.name for path in (kit.folder / "run").iterdir()] == ["last.ckpt"]


def test_a_changed_folder_is_refused_by_all(ranks, kit):
    path = kit.folder / "run" / "step=1.ckpt"

    def check():
        fit(kit, kit.folder / "run", steps=1)
        dist.barrier()
        if dist.get_rank() == 0:
            data = bytearray((path / "__1_0.distcp").read_bytes())
            data[len(data) // 2] ^= 1
            (path / "__1_0.distcp").write_bytes(data)
        dist.barrier()
        with pytest.raises(
            ValueError, match=r"no whole checkpoint \(__1_0.distcp is missing or not what was written\)"
        ):
            fit(kit, kit.folder / "more", ckpt_path=path)

    ranks(2, check)


@pytest.mark.parametrize("rest", [False, True], ids=["weights-only", "all"])
def test_four_save_in_the_first_minute_and_two_or_one_read(ranks, kit, rest):
    """By the clock, in the background; the same state, bit for bit, in any number of processes."""
    path = kit.folder / "run" / "step=3.ckpt"
    by_the_clock = {"train_time_interval": timedelta(microseconds=1), "every_n_train_steps": None}

    def save():
        fit(kit, kit.folder / "run", steps=3, io=BackgroundCheckpoints(), save_weights_only=not rest, **by_the_clock)

    def read():
        module = net(kit)
        options = {"strategy": QuantizedFSDP(), "devices": dist.get_world_size(), "limit_val_batches": 0}
        trainer = kit.trainer(QATCallback("int4-channel-lsq"), **options)
        trainer.validate(module, kit.held_out(), ckpt_path=path, verbose=False)
        state = module.state_dict()
        return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}

    ranks(4, save)
    found = read_sharded(path)
    assert found["global_step"] == 3
    names = read_index(path).state_dict_metadata
    assert any(name.startswith("optimizer_0") for name in names) == rest
    for state in ranks(2, read):
        assert state.keys() == found["state_dict"].keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in found["state_dict"].items())
    alone = kit.Net()
    alone.load_state_dict(found["state_dict"])
    assert len(list(quantizers_of(alone))) == 3
    assert all(torch.equal(alone.state_dict()[name], tensor) for name, tensor in found["state_dict"].items())


def test_lightnings_own_for_the_background(ranks, kit):
    def check():
        with pytest.raises(ValueError, match=r"AsyncCheckpointIO .*plugins=\[qlightning.BackgroundCheckpoints\(\)\]"):
            fit(kit, kit.folder, io=AsyncCheckpointIO())

    ranks(2, check)


class Data(LightningDataModule):
    """For the YAML below, which names it."""

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        rows = torch.utils.data.TensorDataset(*(torch.randn(16, size, generator=generator) for size in (8, 4)))
        return torch.utils.data.DataLoader(rows, 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:You defined a .validation_step.", "ignore:Total length of")
def test_one_line_of_yaml(ranks, kit):
    save = {"dirpath": str(kit.folder / "run"), "every_n_train_steps": 1, "filename": "{step}"}
    trainer = {
        **{"strategy": "qlightning.QuantizedFSDP", "plugins": "qlightning.BackgroundCheckpoints"},
        **{"accelerator": "cpu", "devices": 2, "max_steps": 2, "logger": False},
        **{"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(kit.folder)},
        "callbacks": [
            {"class_path": "qlightning.QATCallback", "init_args": {"weight": "int8-channel"}},
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": save},
        ],
    }
    config = {"trainer": trainer, "model": f"{kit.Net.__module__}.Net", "data": f"{__name__}.Data"}
    (kit.folder / "config.yaml").write_text(yaml.safe_dump(config))

    def check():
        cli = interface()(["fit", "--config", str(kit.folder / "config.yaml")])
        return type(cli.trainer.strategy.checkpoint_io) is BackgroundCheckpoints

    assert ranks(2, check) == [True, True]
    check_shards(kit.folder / "run" / "step=2.ckpt")
    assert [path.name for path in (kit.folder / "run").iterdir()] == ["step=2.ckpt"]


def test_half_removed_is_no_checkpoint(ranks, kit, monkeypatch):
    """A kill while a folder is removed leaves nothing under its name."""
    path = kit.folder / "run" / "step=1.ckpt"
    ranks(2, lambda: fit(kit, kit.folder / "run", steps=1))
    assert path.exists()
    shutil.copytree(path, path.with_name("again"))
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *args, **options: None)
        WholeCheckpoints().remove_checkpoint(path)
    assert not path.exists()
    path.with_name("again").rename(path)
    WholeCheckpoints().remove_checkpoint(path)
    assert list(path.parent.iterdir()) == []
