"""Other models than Llama, and other rotary embeddings, are what transformers reads of their GGUF files."""

import gguf
import pytest
import torch

from qlightning.export.commands import export_module
from qlightning.export.gguf import FILE

MODELS = {
    "llama of another width of heads": {"head_dim": 32},
    "llama 3": {
        "rope_parameters": {
            **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0},
            **{"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
        }
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
}


def model_of(kit, name, rules="gguf-q4_0"):
    """A converted model of a kind, its biases and norms not at their first values."""
    module = kit.llama(rules, **MODELS[name])
    torch.manual_seed(1)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data + 0.5 * torch.randn_like(parameter)
    return module


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_what_was_trained(kit, name):
    proof = export_module(model_of(kit, name), "gguf", kit.out)
    assert proof.passed
    assert str(proof.tolerance) == "0 ulp"
    reader = gguf.GGUFReader(kit.out / FILE)
    kind = MODELS[name].get("model_type", "llama").replace("mistral", "llama")
    assert reader.get_field("general.architecture").contents() == kind
    names = {tensor.name for tensor in reader.tensors}
    assert ("rope_freqs.weight" in names) == (name == "llama 3")
    assert ("blk.0.attn_q.bias" in names) == (name == "qwen2")
    assert ("blk.0.attn_q_norm.weight" in names) == (name == "qwen3")


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_was_trained(kit, name):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: it takes twenty minutes to build")
    module = model_of(kit, name, {"*": {"weight": "gguf-q4_0", "input": "gguf-q8_0"}})
    proof = export_module(module, "gguf", kit.out, options={"runtime": "llama.cpp"})
    assert proof.passed
    assert proof.outputs.sqnr > 60


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"attention_bias": True}, "a llama there has no other biases"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "of type 'linear'"),
        ({"model_type": "mistral", "sliding_window": 8}, r"has no window \(sliding_window=8\)"),
        ({"model_type": "gemma"}, r"only language models of transformers \(llama, mistral, qwen2, qwen3\)"),
    ],
)
def test_models_that_are_not_written(kit, config, message):
    with pytest.raises(ValueError, match=message):
        export_module(kit.llama("gguf-q4_0", **config), "gguf", kit.out)
