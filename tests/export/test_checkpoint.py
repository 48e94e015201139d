"""A checkpoint is read without running anything in it, and gives the trained module back."""

import pytest
import torch
import yaml

from qlightning.data import TextData
from qlightning.export.checkpoint import load_trained, run_data
from qlightning.layers.layer import Twin


def test_a_task_needs_nothing_but_the_file(kit):
    module = kit.llama("int4-lsq")
    loaded = load_trained(kit.checkpoint(module))
    assert type(loaded) is type(module)
    assert not loaded.training
    assert torch.equal(kit.logits(loaded, kit.ids()), kit.logits(module, kit.ids()))


def test_it_keeps_the_dtype_of_the_weights(kit):
    module = kit.llama("int4-g32", dtype=torch.bfloat16)
    loaded = load_trained(kit.checkpoint(module))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(kit.logits(loaded, kit.ids()), kit.logits(module, kit.ids()))


def test_tied_weights_stay_tied(kit):
    module = kit.llama({"*": "int4-g32", "type:Embedding": "int8", "lm_head": "int8"}, tied="share",
                       tie_word_embeddings=True, dtype=torch.bfloat16)  # fmt: skip
    model = load_trained(kit.checkpoint(module)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.lm_head, Twin)


def test_a_module_of_one_s_own_is_named(kit):
    module = kit.plain(width=64)
    path = kit.checkpoint(module)
    with pytest.raises(ValueError, match=r"none of qlightning's tasks: name its class, model="):
        load_trained(path)
    loaded = load_trained(path, model=kit.Plain)
    x = torch.randn(2, 64)
    assert torch.equal(loaded(x), module(x))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.Module", "cannot be imported"),
        ("Module", "cannot be imported"),
        ("qlightning.data.TextData", "is no LightningModule"),
    ],
)
def test_a_wrong_name(kit, name, message):
    with pytest.raises(ValueError, match=message):
        load_trained(kit.checkpoint(kit.plain()), model=name)


def test_hyperparameters_that_were_not_saved(kit):
    path = kit.checkpoint(kit.plain())

    class Needy(kit.Plain):
        def __init__(self, what):
            super().__init__()

    with pytest.raises(ValueError, match=r"Needy cannot be built .* self.save_hyperparameters\(\)"):
        load_trained(path, model=Needy)


def test_wrong_files(kit):
    with pytest.raises(ValueError, match=r"no.ckpt is not there; write for example"):
        load_trained(kit.folder / "no.ckpt")
    with pytest.raises(ValueError, match=r"is a folder, but not one of shards; write for example"):
        load_trained(kit.folder)
    torch.save({"weights": torch.ones(1)}, kit.folder / "other.ckpt")
    with pytest.raises(ValueError, match="is no Lightning checkpoint"):
        load_trained(kit.folder / "other.ckpt")


class Bomb:
    def __reduce__(self):
        return (print, ("the checkpoint ran code",))


def test_nothing_is_unpickled(kit, capsys):
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2", "bomb": Bomb()}, kit.folder / "bomb.ckpt")
    with pytest.raises(ValueError, match="more than tensors and plain data, and is not read: Unsupported global"):
        load_trained(kit.folder / "bomb.ckpt")
    assert "ran code" not in capsys.readouterr().out


def configured(kit, data):
    (kit.folder / "run" / "checkpoints").mkdir(parents=True)
    (kit.folder / "run" / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    return kit.folder / "run" / "checkpoints" / "last.ckpt"


def test_the_run_s_own_datamodule(kit):
    (kit.folder / "a.txt").write_text("word " * 200)
    options = {"path": str(kit.folder / "a.txt"), "tokenizer": "bytes", "sequence_length": 8}
    path = configured(kit, {"class_path": "qlightning.data.TextData", "init_args": options})
    assert isinstance(run_data(path), TextData)


@pytest.mark.parametrize("data", [None, {"class_path": "os.system", "init_args": {"command": "false"}}, "x", {}])
def test_a_config_never_chooses_what_is_imported(kit, data):
    assert run_data(configured(kit, data)) is None
    assert run_data(kit.folder / "elsewhere" / "last.ckpt") is None
