"""Checkpoints that are written beside the training."""

import threading

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from qlightning import BackgroundCheckpoints, QATCallback, WholeCheckpoints
from qlightning.callbacks.background import Queue, staged
from qlightning.checkpoints import read_checkpoint


def test_a_copy_shares_nothing_and_ties_what_was_tied():
    a = torch.arange(6.0)
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = {"a": a, "view": a[2:4], "t": a.view(2, 3).t(), "list": [a, (1, "x")], "net": net.state_dict()}
    copied = staged(state, {})
    assert copied["net"]._metadata == state["net"]._metadata
    assert copied["view"].untyped_storage().data_ptr() == copied["a"].untyped_storage().data_ptr()
    assert copied["view"].untyped_storage().data_ptr() != a.untyped_storage().data_ptr()
    before = {"a": a.clone(), "view": a[2:4].clone(), "t": a.view(2, 3).t().clone()}
    a.zero_()
    with torch.no_grad():
        net[0].weight.zero_()
    assert all(torch.equal(copied[name], value) for name, value in before.items())
    assert copied["t"].stride() == before["t"].stride() or copied["t"].stride() == (1, 3)
    assert copied["list"][1] == (1, "x")
    assert copied["net"]["0.weight"].abs().sum() > 0


def test_wrapping_tensors():
    from torchao.optim.subclass_8bit import OptimState8bit

    state = OptimState8bit.zeros((32, 16), block_size=256)
    state.codes.add_(3)
    copied = staged({"m": state}, {})["m"]
    codes = state.codes.clone()
    state.codes.zero_()
    assert type(copied) is OptimState8bit
    assert torch.equal(copied.codes, codes)


def test_one_after_the_other_and_nothing_after_a_failure():
    queue, done, gate = Queue(), [], threading.Event()

    def fail():
        raise OSError("no room")

    queue.begin(lambda: (gate.wait(10), done.append("first")))
    queue.then(lambda: done.append("second"))
    assert done == []
    gate.set()
    queue.begin(lambda: done.append("third"))
    queue.wait()
    assert done == ["first", "second", "third"]
    queue.begin(fail)
    queue.then(lambda: done.append("never"))
    with pytest.raises(OSError, match="no room"):
        queue.begin(lambda: done.append("nor this"))
    queue.end()
    assert done == ["first", "second", "third"]
    assert not any(thread.name.startswith("checkpoints") for thread in threading.enumerate())


def fit(kit, folder, steps, *, io=None, save=None, **options):
    save = save or ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=1, filename="{step}")
    return kit.fit(
        kit.Net(), QATCallback("int4-lsq"), save, max_steps=steps, plugins=[io or BackgroundCheckpoints()], **options
    )


def test_the_same_files(kit):
    fit(kit, kit.folder / "background", 3)
    fit(kit, kit.folder / "at-once", 3, io=WholeCheckpoints())
    for folder in ("background", "at-once"):
        assert [path.name for path in (kit.folder / folder).iterdir()] == ["step=3.ckpt"]
    found, wanted = (read_checkpoint(kit.folder / name / "step=3.ckpt") for name in ("background", "at-once"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found["state_dict"][name], tensor) for name, tensor in wanted["state_dict"].items())
    moments = [state["optimizer_states"][0]["state"][0]["exp_avg"] for state in (found, wanted)]
    assert torch.equal(*moments)


def test_training_goes_on_while_a_file_is_written(kit, monkeypatch):
    """And what the new one replaces is there until the new one is."""
    folder, gate, seen = kit.folder / "run", threading.Event(), []
    write = WholeCheckpoints.save_checkpoint

    def slowly(self, checkpoint, path, storage_options=None):
        if "step=2" in str(path):
            assert gate.wait(60)
        write(self, checkpoint, path, storage_options)

    class Watch(kit.Record):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 2:
                seen.append(sorted(path.name for path in folder.iterdir()))
                gate.set()

    monkeypatch.setattr(WholeCheckpoints, "save_checkpoint", slowly)
    save = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=1, filename="{step}")
    kit.fit(kit.Net(), QATCallback("int4-lsq"), Watch(), save, max_steps=3, plugins=[BackgroundCheckpoints()])
    assert seen == [["step=1.ckpt"]]
    assert [path.name for path in folder.iterdir()] == ["step=3.ckpt"]


@pytest.mark.parametrize("at", [2, 3], ids=["next-save", "end-of-fit"])
def test_failures_are_raised(kit, monkeypatch, at):
    """And the last checkpoint stays."""
    folder = kit.folder / "run"
    write = WholeCheckpoints.save_checkpoint

    def fail(self, checkpoint, path, storage_options=None):
        if f"step={at}" in str(path):
            raise OSError("no room")
        write(self, checkpoint, path, storage_options)

    monkeypatch.setattr(WholeCheckpoints, "save_checkpoint", fail)
    with pytest.raises(OSError, match="no room"):
        fit(kit, folder, 3)
    assert [path.name for path in folder.iterdir()] == [f"step={at - 1}.ckpt"]


def test_outside_of_a_fit_it_writes_at_once(kit):
    trainer = fit(kit, kit.folder / "run", 1)
    trainer.save_checkpoint(kit.folder / "after.ckpt")
    assert read_checkpoint(kit.folder / "after.ckpt")["global_step"] == 1


def test_a_link_to_what_is_not_there_yet(kit):
    with pytest.raises(ValueError, match=r"ModelCheckpoint\(save_last=True\)"):
        fit(kit, kit.folder / "run", 1, save=ModelCheckpoint(kit.folder / "run", save_last="link"))
