"""A sharded checkpoint is gathered in one process, and nothing in its pickled index is run."""

import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils.data import DataLoader, TensorDataset

from qlightning import QATCallback, QuantizedFSDP
from qlightning.export.checkpoint import load_trained
from qlightning.export.commands import export_checkpoint, verify
from qlightning.export.sharded import read_sharded
from qlightning.shards import INDEX, is_sharded

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def sharded(kit, module, name):
    """The module's checkpoint as a strategy of two processes leaves it, made by one: meta.pt beside the tensors."""
    whole = torch.load(kit.checkpoint(module), weights_only=True)
    folder = kit.folder / "sharded"
    states = {name: whole.pop("state_dict"), "optimizer_0": {"state": {"0": {"step": 3.0, "m": torch.ones(2)}}}}
    dcp.save(states, checkpoint_id=folder, no_dist=True)
    torch.save(whole, folder / "meta.pt")
    return folder


@pytest.mark.parametrize("name", ["state_dict", "model"])
def test_it_is_exported_and_verified(kit, name):
    module = kit.llama("int4-lsq")
    folder = sharded(kit, module, name)
    loaded = load_trained(folder)
    assert torch.equal(kit.logits(loaded, kit.ids()), kit.logits(module, kit.ids()))
    assert export_checkpoint(folder, "compressed-tensors", kit.out).passed
    assert verify(folder, kit.out).passed


def test_tensors_in_pieces(tmp_path, ranks):
    """Rows over two processes, unevenly, beside a tensor that both have."""
    whole = {"a": torch.arange(15.0).view(5, 3), "b": torch.arange(4).to(torch.int8)}

    def save():
        mesh = init_device_mesh("cpu", (2,))
        states = {
            "a": distribute_tensor(whole["a"], mesh, [Shard(0)]),
            "b": distribute_tensor(whole["b"], mesh, [Replicate()]),
        }
        dcp.save({"state_dict": states}, checkpoint_id=tmp_path / "folder")

    ranks(2, save)
    torch.save({"epoch": 3}, tmp_path / "folder" / "meta.pt")
    assert len(list((tmp_path / "folder").glob("*.distcp"))) == 2
    read = read_sharded(tmp_path / "folder")
    assert read["epoch"] == 3
    assert {name: tensor.tolist() for name, tensor in read["state_dict"].items()} == {
        name: tensor.tolist() for name, tensor in whole.items()
    }


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 8))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def predict_step(self, batch, batch_idx):
        return self(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def test_what_a_sharded_fit_leaves(tmp_path, ranks):
    """QuantizedFSDP over two processes: the checkpoint of a real Trainer, exported by one process."""

    def fit():
        trainer = Trainer(
            strategy=QuantizedFSDP(), accelerator="cpu", devices=2, max_steps=2, logger=False, callbacks=[
                QATCallback("int4-g8-lsq", min_coverage=0.0)], enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        module = Net()
        trainer.fit(module, DataLoader(TensorDataset(torch.randn(16, 32)), 4))
        trainer.save_checkpoint(tmp_path / "folder")
        return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in module.state_dict().items()}

    trained = ranks(2, fit)[0]
    loaded = load_trained(tmp_path / "folder", model=Net)
    state = loaded.state_dict()
    assert state.keys() == trained.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.items())
    assert any("weight_quantizer" in name for name in state)
    x = torch.randn(3, 32)
    assert export_checkpoint(tmp_path / "folder", "plain", tmp_path / "out", model=Net, data=[x]).passed


class Bomb:
    def __reduce__(self):
        return (print, ("the index ran code",))


def test_nothing_is_unpickled(tmp_path, capsys):
    tmp_path.joinpath("meta.pt").write_bytes(b"")
    for bomb in (Bomb(), {"a": Bomb()}, torch.nn.Linear(1, 1)):
        (tmp_path / INDEX).write_bytes(pickle.dumps(bomb))
        with pytest.raises(ValueError, match=r"no index of a checkpoint: it names .*, and nothing was run"):
            read_sharded(tmp_path)
    (tmp_path / INDEX).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"is no index of a checkpoint$"):
        read_sharded(tmp_path)
    assert "ran code" not in capsys.readouterr().out


def test_files_stay_in_the_folder(kit):
    folder = sharded(kit, kit.plain(), "state_dict")
    with (folder / INDEX).open("rb") as file:
        index = pickle.load(file)
    for stored in index.storage_data.values():
        stored.relative_path = "../secret.distcp"
    (folder / INDEX).write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="leads out of"):
        read_sharded(folder)


def test_a_checkpoint_without_a_module(tmp_path):
    dcp.save({"other": {"a": torch.ones(1)}}, checkpoint_id=tmp_path / "folder", no_dist=True)
    assert not is_sharded(tmp_path / "folder")
    torch.save({}, tmp_path / "folder" / "meta.pt")
    with pytest.raises(ValueError, match=r"holds no module: write it with FSDPStrategy"):
        read_sharded(tmp_path / "folder")
