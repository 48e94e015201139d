"""The Trainer's checkpoint files: written whole, checked before a run goes on from them."""

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from qlightning import QATCallback, WholeCheckpoints
from qlightning.callbacks.checkpoint_io import keep_checkpoints_whole


def flip(path):
    """Change the last bits of the largest tensor in a checkpoint."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_run_with_a_callback_of_ours_does_not_go_on_from_a_changed_file(kit):
    folder = kit.folder / "run"
    kit.fit(kit.Net(), QATCallback("int4-lsq"), kit.every_step(folder), max_steps=2)
    flip(folder / "step=2.ckpt")
    with pytest.raises(ValueError, match=r"step=2.ckpt is no whole checkpoint .*not what was written.*: resume from"):
        kit.fit(
            kit.Net(), QATCallback("int4-lsq"), kit.every_step(folder), ckpt_path=folder / "step=2.ckpt", max_steps=3
        )
    kit.fit(kit.Net(), QATCallback("int4-lsq"), kit.every_step(folder), ckpt_path=folder / "step=1.ckpt", max_steps=3)


def test_as_a_plugin_of_any_trainer(kit):
    folder = kit.folder / "run"
    trainer = kit.fit(kit.Net(), kit.every_step(folder), max_steps=2, plugins=[WholeCheckpoints()])
    assert sorted(path.name for path in folder.iterdir()) == ["step=1.ckpt", "step=2.ckpt"]
    assert torch.load(folder / "step=2.ckpt", weights_only=True)["global_step"] == 2
    trainer.strategy.remove_checkpoint(folder / "step=1.ckpt")
    assert not (folder / "step=1.ckpt").exists()
    flip(folder / "step=2.ckpt")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        trainer.validate(kit.Net(), kit.held_out(), ckpt_path=folder / "step=2.ckpt")


def test_only_what_nobody_chose_is_replaced(kit):
    def chosen(plugins):
        trainer = kit.trainer(plugins=plugins)
        keep_checkpoints_whole(trainer)
        return trainer.strategy.checkpoint_io

    class Own(TorchCheckpointIO):
        pass

    mine = Own()
    assert chosen([mine]) is mine
    assert type(chosen([])) is WholeCheckpoints
    background = chosen([AsyncCheckpointIO()])
    assert isinstance(background, AsyncCheckpointIO)
    assert type(background.checkpoint_io) is WholeCheckpoints


def test_saved_in_the_background(kit):
    folder = kit.folder / "run"
    plugins = [AsyncCheckpointIO(WholeCheckpoints())]
    kit.fit(kit.Net(), QATCallback("int4-lsq"), kit.every_step(folder), max_steps=2, plugins=plugins)
    kit.fit(kit.Net(), QATCallback("int4-lsq"), kit.every_step(folder), ckpt_path=folder / "step=2.ckpt", max_steps=3)


def test_other_places_are_lightnings(kit):
    """Remote files have ways of their own to be whole."""
    io = WholeCheckpoints()
    io.save_checkpoint({"step": 1}, "memory://runs/last.ckpt")
    assert io.load_checkpoint("memory://runs/last.ckpt") == {"step": 1}
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint({"step": 1}, kit.folder / "last.ckpt", storage_options={})
