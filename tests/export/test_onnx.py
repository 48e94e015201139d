"""ONNX artifacts run in onnxruntime and compute what was trained."""

import json
from collections import Counter

import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoModelForImageClassification, ViTConfig

from qlightning.export.commands import export_module, verify_module
from qlightning.export.onnx import FILE
from qlightning.layers.convert import convert

VIT = ViTConfig(
    image_size=8, patch_size=4, num_channels=1, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2,
)  # fmt: skip


def vit(rules):
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(VIT).eval()
    convert(model, rules, min_coverage=0)
    return model


def loaded(folder):
    return onnx.load(folder / FILE, load_external_data=False)


def operators(folder):
    onnx.checker.check_model(str(folder / FILE), full_check=True)
    return Counter(node.op_type for node in loaded(folder).graph.node)


def test_a_vision_transformer(tmp_path):
    """Also in a session that a user makes, with the entries that the artifact names, on batches of other sizes."""
    model = vit({"*": "int8", "mlp.fc1": "int4-g16", "classifier": None})
    proof = export_module(model, "onnx", tmp_path / "out")
    assert proof.passed
    assert len(proof.layers) == 7
    assert proof.outputs.sqnr > 120
    assert min(layer.sqnr for layer in proof.layers) > 120
    assert verify_module(model, tmp_path / "out").passed
    assert operators(tmp_path / "out")["DequantizeLinear"] == 7
    assert (tmp_path / "out" / FILE).stat().st_size < 100_000
    facts = json.loads({p.key: p.value for p in loaded(tmp_path / "out").metadata_props}["qlightning"])
    options = onnxruntime.SessionOptions()
    for name, value in facts["session"].items():
        options.add_session_config_entry(name, value)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / FILE), options)
    assert session.get_inputs()[0].shape == ["batch", 1, 8, 8]
    assert [value.name for value in session.get_outputs()] == ["logits"]
    for batch in (1, 5):
        images = torch.randn(batch, 1, 8, 8)
        (logits,) = session.run(None, {"pixel_values": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(images).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_are_refused(kit, dtype):
    with pytest.raises(ValueError, match=r"write dtype='float32' \(--dtype float32\)"):
        export_module(kit.plain("int8"), "onnx", kit.out, dtype=dtype)
