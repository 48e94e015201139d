"""ONNX artifacts run in onnxruntime and compute what was trained."""

import json
import weakref
from collections import Counter

import onnx
import onnxruntime
import pytest
import torch
from diffusers import UNet2DModel
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig

from qlightning.export import onnx_weights
from qlightning.export.commands import export_module, verify_module
from qlightning.export.onnx import FILE, ONNX
from qlightning.export.onnx_trace import _linear
from qlightning.export.trained import Trained
from qlightning.layers.convert import convert
from qlightning.layers.scheme import Scheme
from qlightning.numerics.spec import parse

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


def test_a_llama(kit, monkeypatch):
    """Tied, with mixed bits, a skipped layer, and quantizers of inputs and of the KV cache; streamed."""
    alive, most, own = weakref.WeakSet(), [], onnx_weights.codes_of

    def codes_of(weight):
        codes = own(weight)
        alive.add(codes)
        most.append(len(alive))
        return codes

    monkeypatch.setattr(onnx_weights, "codes_of", codes_of)
    rules = {
        **{"*": Scheme("int4-g16-asym", kv_cache="int8-token"), "mlp.down_proj": None},
        **{"q_proj": Scheme("int4-g16", input="int8-token-asym"), "mlp.up_proj": Scheme("int8", input="int8-g16")},
        **{"type:Embedding": "int8", "lm_head": "int8"},
    }
    module = kit.llama(rules, tied="share", tie_word_embeddings=True)
    proof = export_module(module, "onnx", kit.out)
    assert proof.passed
    assert len(proof.layers) == 8
    assert min(layer.sqnr for layer in proof.layers) > 120
    assert (len(most), max(most)) == (7, 1)  # the tied weight is stored once
    runtime = ONNX().load(kit.out, Trained(module))
    ids = kit.ids()[:1, :5]
    (logits,) = runtime(input_ids=ids, use_cache=False)
    torch.testing.assert_close(logits, kit.logits(module, ids), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="written for use_cache=False, and was called with use_cache=True"):
        runtime(input_ids=ids, use_cache=True)
    with pytest.raises(ValueError, match="the artifact takes input_ids; it was given input_ids, attention_mask"):
        runtime(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_a_unet(tmp_path):
    """Inputs of one learned scale become QuantizeLinear and DequantizeLinear."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=4, in_channels=1, out_channels=1, block_out_channels=(16,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("AttnDownBlock2D",), up_block_types=("UpBlock2D",), attention_head_dim=8, add_attention=False,
    ).eval()  # fmt: skip
    convert(unet, {"*": Scheme("int8", input="int8-tensor-lsq"), "conv_in": None, "to_k": "int4-g16"}, min_coverage=0)
    settle(unet, torch.randn(2, 1, 4, 4), torch.tensor([1, 500]))
    proof = export_module(unet, "onnx", tmp_path / "out", options={"batch": 2})
    assert proof.passed
    assert min(layer.sqnr for layer in proof.layers) > 120
    found = operators(tmp_path / "out")
    assert found["QuantizeLinear"] == len(proof.layers) - 1
    assert found["DequantizeLinear"] == 2 * len(proof.layers) - 1
    graph = loaded(tmp_path / "out").graph
    assert [value.name for value in graph.output] == ["out_sample"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2


def settle(model, *inputs):
    """Give static scales of activations what one batch shows."""
    quantizers = [q for layer in Trained(model).layers for found in layer.activations.values() for q in found]
    for quantizer in quantizers:
        quantizer.enabled, quantizer.observing = False, True
    with torch.no_grad():
        model(*inputs)
    for quantizer in quantizers:
        quantizer.enabled, quantizer.observing = True, False
        quantizer.scale.settle()


def test_trained_in_bfloat16(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).bfloat16()
    convert(module, {"0": Scheme("int4-g16", input="int8-token"), "2": "int8"})
    batch = torch.randn(4, 32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"write dtype='float32' \(--dtype float32\)"):
        export_module(module.eval(), "onnx", tmp_path / "out", data=[batch])
    proof = export_module(module, "onnx", tmp_path / "out", data=[batch], dtype="float32")
    assert proof.passed
    assert "trained in bfloat16, exported in float32" in str(proof.tolerance)
    assert module[0].weight.dtype == torch.bfloat16


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else x


def test_what_cannot_be_traced_says_so(tmp_path):
    module = Branching().eval()
    convert(module, "int8")
    with pytest.raises(ValueError, match=r"torch.export cannot trace Branching .*format 'plain' takes any model"):
        export_module(module, "onnx", tmp_path / "out", data=[torch.ones(2, 8)])
    assert torch.equal(module(torch.ones(2, 8)), module.linear(torch.ones(2, 8)))  # no marks are left
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spec", "fits"),
    [
        *[("int8-tensor-lsq", True), ("uint8-tensor-ema", True), ("int8-tensor-lsq-asym", False)],
        *[("int8-tensor-lsq-narrow", False), ("int4-tensor-lsq", False), ("int8-tensor", False)],
    ],
)
def test_static_scales_that_the_operators_can_say(spec, fits):
    """A zero point is added before rounding in training and after it in QuantizeLinear."""
    quantizer = parse(spec)
    quantizer.build((2, 8))
    quantizer.initialize(torch.randn(2, 8))
    linear = _linear(quantizer)
    assert (linear is not None) == fits
    if linear is not None:
        assert torch.equal(linear.value, quantizer.grid(torch.zeros(2, 8)).scale.reshape(()))


@pytest.mark.parametrize("opset", [20, 26])
def test_operator_sets(opset):
    with pytest.raises(ValueError, match="from 21 to 25"):
        ONNX(opset=opset)
