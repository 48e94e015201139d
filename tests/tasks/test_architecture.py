import builtins

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qlightning.tasks.architecture import diffusers_model, import_diffusers, plain_config, transformers_model

from .conftest import DIT, LLAMA, UNET


def test_a_config_gives_the_model_that_transformers_builds():
    torch.manual_seed(0)
    ours = transformers_model(AutoModelForCausalLM, {**LLAMA, "vocab_size": 11}, known={"vocab_size": 99})
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"}, vocab_size=11))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_what_the_data_know_fills_gaps_only():
    known = {"vocab_size": 99, "hidden_size": None}
    assert transformers_model(AutoModelForCausalLM, LLAMA, known=known).config.vocab_size == 99
    assert transformers_model(AutoModelForCausalLM, LLAMA, known=known).config.hidden_size == 16


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "qwen3"])
def test_the_plain_config_builds_the_same_architecture(kind):
    sizes = {"gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2}, "opt": {"hidden_size": 16, "ffn_dim": 32}}
    source = {"model_type": kind, "vocab_size": 40, "num_attention_heads": 2, "num_hidden_layers": 1}
    source |= sizes.get(kind, {"hidden_size": 16, "intermediate_size": 32, "num_key_value_heads": 2})
    model = transformers_model(AutoModelForCausalLM, source, known={})
    again = transformers_model(AutoModelForCausalLM, plain_config(model), known={})
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in again.named_parameters()}
    assert plain_config(again) == plain_config(model)


def test_the_default_dtype_is_followed():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        model = transformers_model(AutoModelForCausalLM, {**LLAMA, "vocab_size": 11}, known={})
        denoiser, _ = diffusers_model(UNET)
    finally:
        torch.set_default_dtype(before)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in denoiser.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("config", [UNET, DIT], ids=lambda c: c["_class_name"])
def test_a_folder_of_diffusers_gives_its_weights_and_its_config(config, tmp_path):
    model, used = diffusers_model(config)
    assert used == config
    model.save_pretrained(tmp_path)
    loaded, plain = diffusers_model(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    again, _ = diffusers_model(plain)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sample_size": 8}, "UNet2DModel"),
        ({"_class_name": "UNet3D"}, "UNet2DModel"),
        ({"_class_name": "DDPMScheduler"}, "UNet2DModel"),
        ({**UNET, "sample_sise": 8}, "did you mean 'sample_size'"),
    ],
)
def test_errors_show_the_corrected_call(config, message):
    with pytest.raises(ValueError, match=message):
        diffusers_model(config)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/model", "~/nowhere", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_looked_up_on_the_hub(source):
    with pytest.raises(ValueError, match="hub name as 'user/name'"):
        transformers_model(AutoModelForCausalLM, source, known={})
    with pytest.raises(ValueError, match="hub name as 'user/name'"):
        diffusers_model(source)


def test_without_diffusers_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **named):
        if name == "diffusers":
            raise ModuleNotFoundError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'qlightning\[diffusion\]'"):
        import_diffusers()
