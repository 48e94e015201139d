"""Model folders: names in files, tied weights, configs."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, ViTConfig, ViTForImageClassification

from qlightning.export import pretrained
from qlightning.export.commands import export_module
from qlightning.export.trained import Trained
from qlightning.layers.convert import convert

MIXTRAL = MixtralConfig(
    vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=3,
)  # fmt: skip


@pytest.fixture
def mixtral():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MIXTRAL).eval()
    convert(model, "int4-g32")
    return model


@pytest.fixture
def vit():
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, hidden_size=16, intermediate_size=16,
                       num_hidden_layers=1, num_attention_heads=2)  # fmt: skip
    model = ViTForImageClassification(config).eval()
    convert(model, "int4-g16")
    return model


def test_fused_experts_are_taken_apart_as_transformers_does(mixtral, tmp_path):
    mixtral.save_pretrained(tmp_path / "theirs")
    proof = export_module(mixtral, "plain", tmp_path / "ours")
    assert proof.passed
    ours, theirs = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == {name for name in theirs if "_quantizer" not in name}
    assert all(ours[name].shape == theirs[name].shape for name in ours)
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in ours
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, mixtral(ids).logits)


def test_names_that_transformers_changes(mixtral, vit):
    names = pretrained.Names(Trained(mixtral))
    assert names.of("model.layers.0.self_attn.q_proj.weight") == "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=r"is several tensors in files: .*experts.0.w1.weight"):
        names.of("model.layers.0.mlp.experts.gate_up_proj")
    assert pretrained.Names(Trained(vit)).of("vit.layers.0.attention.q_proj.weight") == (
        "vit.encoder.layer.0.attention.attention.query.weight"
    )


def test_a_vision_transformer(vit, tmp_path):
    proof = export_module(vit, "plain", tmp_path / "out")
    assert proof.passed
    image = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(ViTForImageClassification.from_pretrained(tmp_path / "out")(image).logits, vit(image).logits)


@pytest.mark.parametrize("tied", ["float", "share"])
def test_tied_weights_are_written_once(kit, tied):
    rules = {"*": "int4-g32", "type:Embedding": "int8", "lm_head": "int8"} if tied == "share" else "int4-g32"
    module = kit.llama(rules, tied=tied, tie_word_embeddings=True)
    assert export_module(module, "plain", kit.out).passed
    names = load_file(kit.out / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    loaded = AutoModelForCausalLM.from_pretrained(kit.out)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(kit.ids()).logits, kit.logits(module, kit.ids()))


def test_the_config(kit):
    trained = Trained(kit.llama())
    kit.out.mkdir()
    pretrained.write_config(trained, kit.out, dtype=torch.bfloat16, quantization={"quant_method": "x"}, untie=True)
    config = json.loads((kit.out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"] == {"quant_method": "x"}
    assert (kit.out / "generation_config.json").exists()
    assert getattr(trained.config, "quantization_config", None) is None


def test_a_folder_that_lacks_a_tensor_is_not_this_model(kit):
    export_module(kit.llama(), "plain", kit.out)
    with pytest.raises(ValueError, match=r"does not hold this model: .*missing_keys.*layers.1"):
        pretrained.load(kit.out, Trained(kit.llama()), num_hidden_layers=2)


def test_a_model_of_diffusers(tmp_path):
    import diffusers

    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=[8], norm_num_groups=4,
        down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"], layers_per_block=1,
    ).eval()  # fmt: skip
    convert(model, "int4", min_coverage=0)
    proof = export_module(model, "plain", tmp_path / "out")
    assert proof.passed
    assert len(proof.layers) > 10
    assert (tmp_path / "out" / "diffusion_pytorch_model.safetensors").exists()
    loaded = diffusers.UNet2DModel.from_pretrained(tmp_path / "out").requires_grad_(False)
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(x, 3).sample, model(x, 3).sample)
