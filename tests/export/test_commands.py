"""Export and verify from the file to the proof, and everything they refuse."""

import errno
import json

import pytest
import torch
from jsonargparse import auto_cli
from safetensors.torch import load_file, save_file

from qlightning.export.artifact import MANIFEST, read_manifest, write_manifest
from qlightning.export.commands import (
    export_checkpoint,
    export_command,
    export_module,
    verify,
    verify_command,
    verify_module,
)
from qlightning.export.target import targets
from qlightning.layers.scheme import Scheme

SPECS = {"gguf": "gguf-q4_0", "bitsandbytes": "nf4-g32"}  # where it has no place for int4-g32


def test_from_checkpoint_to_proof_and_again(kit):
    path = kit.checkpoint(kit.llama())
    proof = export_checkpoint(path, "compressed-tensors", kit.out)
    assert proof.passed
    assert "random inputs (seed 0)" in proof.inputs
    facts = json.loads((kit.out / MANIFEST).read_text())
    assert facts["format"] == "compressed-tensors"
    assert facts["checkpoint"] == "last.ckpt"
    assert facts["proof"]["passed"]
    assert set(facts["files"]) == {"config.json", "generation_config.json", "model.safetensors"}
    again = verify(path, kit.out, data=[{"input_ids": kit.ids()}])
    assert again.passed
    assert again.inputs == "1 held-out batches"


def test_one_scale_off_by_one_ulp_in_the_file_fails(kit):
    module = kit.llama()
    export_module(module, "compressed-tensors", kit.out)
    tensors = load_file(kit.out / "model.safetensors")
    scale = tensors["model.layers.0.mlp.up_proj.weight_scale"]
    scale[7, 1] = torch.nextafter(scale[7, 1], torch.tensor(9.0))
    save_file(tensors, kit.out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.safetensors is missing or not what was written"):
        verify_module(module, kit.out)
    write_manifest(kit.out, json.loads((kit.out / MANIFEST).read_text()))  # as if that were what was written
    proof = verify_module(module, kit.out)
    assert not proof.passed
    differing = [difference.name for difference in proof.layers if difference.largest]
    assert differing == ["model.layers.0.mlp.up_proj"]
    assert proof.outputs.largest > 0


def test_another_checkpoint_is_no_match(kit):
    export_module(kit.llama(), "plain", kit.out)
    other = kit.llama()
    with torch.no_grad():
        other.model.lm_head.weight[0] += 1
    proof = verify_module(other, kit.out)
    assert not proof.passed
    assert proof.outputs.largest > 0
    assert all(difference.largest == 0 for difference in proof.layers)


def test_an_artifact_that_is_not_what_was_trained_is_not_kept(kit, monkeypatch):
    from qlightning.export.trained import Weight

    own = Weight.values
    monkeypatch.setattr(Weight, "values", lambda self, dtype=None: own(self, dtype) * 1.01)
    with pytest.raises(ValueError, match=r"does not compute what was trained, so it is not kept(.|\n)*FAILED"):
        export_module(kit.llama(), "plain", kit.out)
    assert list(kit.folder.iterdir()) == []


def test_the_module_is_left_as_it_was(kit):
    module = kit.llama(Scheme("int4-g32", input="int8-token"))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    outputs, config = kit.logits(module, kit.ids()), module.model.config.to_dict()
    export_module(module, "compressed-tensors", kit.out)
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(kit.logits(module, kit.ids()), outputs)
    assert module.model.config.to_dict() == config


def test_what_was_dropped_is_in_the_manifest(kit):
    module = kit.llama(Scheme("int4-g32", output="int8-token"))
    with pytest.raises(ValueError, match=r"output of 7 layers: (.|\n)*--drop output"):
        export_module(module, "compressed-tensors", kit.out)
    assert not kit.out.exists()
    proof = export_module(module, "compressed-tensors", kit.out, drop=["output"])
    assert proof.passed
    assert proof.without == ["output"]
    facts = json.loads((kit.out / MANIFEST).read_text())
    assert len(facts["dropped"]["output"]) == 7
    assert verify_module(module, kit.out).passed


def test_in_another_dtype_than_trained(kit):
    module = kit.llama("int4-g32-sbf16")
    proof = export_module(module, "plain", kit.out, dtype="bfloat16")
    assert proof.passed
    assert "trained in float32, exported in bfloat16" in str(proof.tolerance)
    assert 25 < proof.outputs.sqnr < 70
    assert {tensor.dtype for tensor in load_file(kit.out / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "plane"}, "did you mean 'plain'"),
        ({"dtype": "int8"}, "dtype='int8': write 'float32'"),
        ({"options": {"speed": 1}}, "options of plain: .*speed"),
    ],
)
def test_wrong_options(kit, options, message):
    with pytest.raises(ValueError, match=message):
        export_module(kit.llama(), **{"format": "plain", "out": kit.out, **options})


def test_an_existing_folder(kit):
    module = kit.llama()
    export_module(module, "plain", kit.out)
    with pytest.raises(ValueError, match="--force"):
        export_module(module, "plain", kit.out)
    export_module(module, "compressed-tensors", kit.out, force=True)
    assert json.loads((kit.out / MANIFEST).read_text())["format"] == "compressed-tensors"


def test_a_tokenizer_beside_the_model(kit):
    source = kit.folder / "tokenizer"
    source.mkdir()
    with pytest.raises(ValueError, match=r"has no tokenizer in it, such as a tokenizer.json"):
        export_module(kit.llama(), "plain", kit.out, tokenizer=source)
    assert not kit.out.exists()
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors", "code.py"):
        (source / name).write_text("{}")
    export_module(kit.llama(), "plain", kit.out, tokenizer=source)
    files = json.loads((kit.out / MANIFEST).read_text())["files"]
    assert files["tokenizer.json"]["bytes"] == 2
    assert files["model.safetensors"]["bytes"] > 2
    assert "code.py" not in files


def test_as_jsonargparse_reads_them(kit):
    path = kit.checkpoint(kit.llama({"*": {"weight": "int4-g32", "output": "int8-token"}}))
    words = ["--checkpoint", str(path), "--format", "plain", "--out", str(kit.out), "--drop", '["output"]']
    proof = auto_cli(export_command, args=[*words, "--options", '{"shard_bytes": 60000}'], as_positional=False)
    assert proof.passed
    assert len(list(kit.out.glob("*.safetensors"))) > 1
    words = ["--checkpoint", str(path), "--artifact", str(kit.out), "--batches", "1"]
    assert auto_cli(verify_command, args=words, as_positional=False).passed


@pytest.mark.parametrize("format", sorted(targets()))
def test_a_full_disk(kit, full_disk, format):
    """Whatever a target writes with: a clear error, nothing that looks like an artifact, and the old one unharmed."""
    module = kit.plain() if format == "onnx" else kit.llama(SPECS.get(format, "int4-g32"))
    export_module(kit.plain(), "plain", kit.out)
    words = (
        r"artifact could not be written \((File too large|.* not all written)\); what was there is unharmed: make room"
    )
    with pytest.raises(OSError, match=words) as caught, full_disk():
        export_module(module, format, kit.out, force=True)
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert read_manifest(kit.out)["format"] == "plain"
    assert [path.name for path in kit.folder.iterdir()] == ["artifact"]
