"""Mixtures of experts, vision transformers, GPT-2 and UNets through the targets that take them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, GPT2Config, MixtralConfig, ViTConfig

from qlightning.export.commands import export_module
from qlightning.layers.convert import convert

MIXTRAL = MixtralConfig(
    vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=3,
)  # fmt: skip
VIT = ViTConfig(
    image_size=8, patch_size=4, num_channels=1, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2,
)  # fmt: skip
IDS = torch.arange(10).view(2, 5)
IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def made(auto, config, rules, **options):
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    convert(model, rules, min_coverage=0, **options)
    return model


def same(folder, auto, model, x):
    loaded = auto.from_pretrained(folder).requires_grad_(False)
    with torch.no_grad():
        return torch.equal(loaded(x).logits, model(x).logits)


@pytest.mark.parametrize("rules", ["int4-g32", {"*": "int8", "type:MixtralExperts": "int3-g16"}])
def test_experts_are_packed_one_by_one(tmp_path, rules):
    model = made(AutoModelForCausalLM, MIXTRAL, rules)
    proof = export_module(model, "compressed-tensors", tmp_path / "out")
    assert proof.passed
    assert str(proof.tolerance) == "0 ulp"
    assert len(proof.layers) == 5
    assert same(tmp_path / "out", AutoModelForCausalLM, model, IDS)
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert "model.layers.0.block_sparse_moe.experts.2.w3.weight_packed" in names
    assert not [name for name in names if name.endswith("proj.weight")]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"*": "int4-g32", "type:MixtralExperts": None}, "does not read experts in float .*gate_up_proj"),
        ({"*": "int4-g32", "type:MixtralExperts": "nf4-g32"}, "does not read experts in float"),
        ({"*": "int4-g32", "type:MixtralExperts": "int4-g32-asym"}, "does not read experts in float"),
        ({"*": {"weight": "int4-g32", "input": "int8-token"}}, "only inputs of linear layers with quantized weights"),
    ],
)
def test_experts_that_cannot_be_read_back(tmp_path, rules, message):
    with pytest.raises(ValueError, match=message):
        export_module(made(AutoModelForCausalLM, MIXTRAL, rules), "compressed-tensors", tmp_path / "out")


@pytest.mark.parametrize("format", ["compressed-tensors", "torchao", "bitsandbytes"])
def test_a_vision_transformer(tmp_path, format):
    spec = "nf4" if format == "bitsandbytes" else "int4"
    rules = {"*": f"{spec}-g32", "patch_embeddings.projection": f"{spec}-g16"}
    model = made(AutoModelForImageClassification, VIT, rules)
    with pytest.raises(ValueError, match=r"codes of 1 layer: .*patch_embeddings.projection"):
        export_module(model, format, tmp_path / "out")
    proof = export_module(model, format, tmp_path / "out", drop=["codes"])
    assert proof.passed
    assert len(proof.layers) == 8
    assert format == "bitsandbytes" or same(tmp_path / "out", AutoModelForImageClassification, model, IMAGES)


def test_gpt2_in_the_plain_format(tmp_path):
    """Its layers are transposed, its head is tied."""
    config = GPT2Config(vocab_size=16, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    model = made(AutoModelForCausalLM, config, {"*": "int4-g32", "type:Embedding": "int8", "lm_head": "int8",
                                                "transformer.wpe": None}, tied="share")  # fmt: skip
    proof = export_module(model, "plain", tmp_path / "out")
    assert proof.passed
    assert same(tmp_path / "out", AutoModelForCausalLM, model, IDS)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gpt2"
