"""ExportCallback at the end of a real fit."""

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM

from qlightning import QATCallback
from qlightning.data.loader import Loader
from qlightning.export.artifact import read_manifest
from qlightning.export.callback import ExportCallback
from qlightning.export.commands import verify
from qlightning.tasks import CausalLM


class Ids(LightningDataModule):
    def _loader(self):
        ids = torch.randint(48, (8, 9), generator=torch.Generator().manual_seed(0))
        return DataLoader([{"input_ids": row} for row in ids], batch_size=4)

    train_dataloader = val_dataloader = _loader


def trainer(kit, *callbacks, **options):
    return Trainer(
        callbacks=list(callbacks),
        **{
            **{"accelerator": "cpu", "logger": False, "max_steps": 3, "default_root_dir": kit.folder},
            **{"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0},
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            **options,
        },
    )


def test_a_fit_ends_with_a_proven_artifact(kit):
    save = ModelCheckpoint(kit.folder / "run", save_last=True)
    export = ExportCallback("compressed-tensors", str(kit.out))
    module = CausalLM(kit.LLAMA, lr=0.01)
    trainer(kit, QATCallback("int4-g32-lsq", "int8-token"), export, save).fit(module, Ids())
    assert export.proof.passed
    assert export.proof.inputs == "2 held-out batches"
    assert read_manifest(kit.out)["checkpoint"] == "step 3"
    assert module.training
    loaded = AutoModelForCausalLM.from_pretrained(kit.out)
    assert torch.equal(loaded(kit.ids()).logits, kit.logits(module.eval(), kit.ids()))
    again = verify(kit.folder / "run" / "last.ckpt", kit.out, data=Ids())
    assert again.passed
    assert again.inputs == "2 validation batches of Ids"


def test_without_validation_data_inputs_are_random(kit):
    class Net(kit.Plain):
        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    export = ExportCallback("plain", str(kit.out), batches=1)
    rows = Loader(TensorDataset(torch.randn(8, 32)), batch_size=4)
    trainer(kit, QATCallback("int4-g32"), export).fit(Net(), rows)
    assert export.proof.passed
    assert export.proof.inputs == "the module's example_input_array"


def test_what_is_wrong_is_said_before_the_fit(kit):
    with pytest.raises(ValueError, match="did you mean 'plain'"):
        ExportCallback("plan", str(kit.out))
    with pytest.raises(ValueError, match="options of plain"):
        ExportCallback("plain", str(kit.out), options={"speed": 1})
    with pytest.raises(ValueError, match="dtype='half'"):
        ExportCallback("plain", str(kit.out), dtype="half")
    kit.out.mkdir()
    (kit.out / "thesis.txt").write_text("x")
    for force in (False, True):
        run = trainer(kit, QATCallback("int4-g32"), ExportCallback("plain", str(kit.out), force=force))
        with pytest.raises(ValueError, match="artifact"):
            run.fit(CausalLM(kit.LLAMA), Ids())
        assert run.global_step == 0


def test_a_rehearsal_writes_nothing(kit):
    export = ExportCallback("plain", str(kit.out))
    trainer(kit, QATCallback("int4-g32", start=0.9), export, fast_dev_run=1).fit(CausalLM(kit.LLAMA), Ids())
    assert not kit.out.exists()
