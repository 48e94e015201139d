"""The models that a GGUF file can hold: what llama.cpp calls them, their metadata, and how it orders their rows.

| model of transformers | llama.cpp's architecture | query and key |
| --- | --- | --- |
| llama, mistral | llama | the halves of a rotary pair side by side |
| qwen2, qwen3 | qwen2, qwen3 | as in transformers |
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Architecture(NamedTuple):
    """What llama.cpp knows of a kind of model.

    Attributes:
        name: Its name for it.
        pairs: Whether it has the two halves of each rotary pair side by side.
        biases: Whether query, key and value have biases.
    """

    name: str
    pairs: bool
    biases: bool


_KNOWN = {
    "llama": Architecture("llama", pairs=True, biases=False),
    "mistral": Architecture("llama", pairs=True, biases=False),
    "qwen2": Architecture("qwen2", pairs=False, biases=True),
    "qwen3": Architecture("qwen3", pairs=False, biases=False),
}
_ROPES = ("default", "llama3")


def architecture(model: Any) -> Architecture | str:
    """llama.cpp's architecture for a model, or why it has none."""
    config = getattr(model, "config", None)
    found = _KNOWN.get(getattr(config, "model_type", ""))
    if found is None or not hasattr(model, "lm_head"):
        return f"only language models of transformers ({', '.join(_KNOWN)}) are written; format 'plain' takes any"
    assert config is not None
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in _ROPES:
        return f"rotary embeddings of type {kind!r} are not written; format 'plain' keeps them"
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    if biased or config.hidden_act != "silu":
        return f"a {config.model_type} there has no other biases and the activation silu; format 'plain' keeps others"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return f"attention there has no window (sliding_window={window}); format 'plain' keeps it"
    return found


def ordered(model: Any, key: str) -> Callable[[Tensor], Tensor]:
    """What to do with the rows of a tensor to have them in llama.cpp's order."""
    config, known = model.config, _KNOWN[model.config.model_type]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((n for layer, n in heads.items() if f".{layer}." in key), None)
    if count is None or not known.pairs:
        return lambda rows: rows
    return lambda rows: rows.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(rows.shape)


def rope_factors(model: Any) -> Tensor | None:
    """By what the frequencies of the rotary embedding are divided, float32 (head features / 2), or None for by 1."""
    config = model.config
    if config.rope_parameters.get("rope_type", "default") == "default":
        return None
    head, base = _head(config), float(config.rope_parameters["rope_theta"])
    plain = 1.0 / base ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    scaled: Tensor = model.model.rotary_emb.inv_freq
    return plain / scaled.float().cpu()


def reading_options(config: Any) -> dict[str, Any]:
    """What transformers does not read of such a file and must be told."""
    told: dict[str, Any] = {"head_dim": _head(config)} if config.model_type == "qwen3" else {}
    if config.rope_parameters.get("rope_type", "default") != "default":
        told["rope_parameters"] = dict(config.rope_parameters)
    if config.model_type == "mistral":  # without a window it is a Llama, and no reader can tell
        from transformers import LlamaForCausalLM

        told["cls"] = LlamaForCausalLM
    return told


def write_metadata(writer: Any, config: Any) -> None:
    """Add what describes the model to a `gguf.GGUFWriter`."""
    head = _head(config)
    writer.add_name(_KNOWN[config.model_type].name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _head(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
