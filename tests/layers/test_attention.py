"""Keys, values and probabilities: exact beside the plain model, and the same with and without a cache."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.cache_utils import Cache, DynamicLayer

from qlightning.layers.convert import convert, quantizers_of, restore
from qlightning.layers.scheme import Scheme
from qlightning.layers.swap import convert_like
from qlightning.numerics.spec import parse

USUAL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TYPES = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
CONFIGS = {
    "llama": LlamaConfig(**USUAL),
    "qwen3": Qwen3Config(**USUAL),
    "gemma2": Gemma2Config(**USUAL, **TYPES, attn_logit_softcapping=1.0),
    "gpt_oss": GptOssConfig(**USUAL, **TYPES, num_local_experts=2, num_experts_per_tok=1),
    "gpt2": GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0, use_cache=True
    ),
    "opt": OPTConfig(
        vocab_size=32,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    ),
}
CASES = [
    *((name, "sdpa") for name in ("llama", "qwen3", "gpt2", "opt")),
    *((name, "eager") for name in ("llama", "gpt_oss", "gemma2")),
]
BOTH = Scheme(kv_cache="int4-token", attention="uint4-token")


def causal_lm(name: str = "llama", implementation: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():  # attention that is not almost uniform
            if parameter.dim() == 2:
                parameter.mul_(12)
    return model.eval()


def text(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(1, 32, (rows, length), generator=torch.Generator().manual_seed(1))


def switch(model: nn.Module, *, enabled: bool, observing: bool = False) -> None:
    for _, quantizer in quantizers_of(model):
        quantizer.enabled, quantizer.observing = enabled, observing


def padded(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return mask


@torch.no_grad()
def logits(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_bypassed_is_the_plain_model_and_restored_too(name, implementation):
    model, ids = causal_lm(name, implementation), text()
    inputs = [{"input_ids": ids}, {"input_ids": ids, "attention_mask": padded(ids)}]
    plain = [logits(model, **x) for x in inputs]

    convert(model, BOTH)
    assert model.config._attn_implementation == implementation
    assert all(not torch.allclose(logits(model, **x), y, atol=1e-3) for x, y in zip(inputs, plain, strict=True))

    switch(model, enabled=False)
    assert all(torch.equal(logits(model, **x), y) for x, y in zip(inputs, plain, strict=True))

    switch(model, enabled=False, observing=True)  # the way through the probabilities, not quantized
    seen = padded(ids).bool()
    torch.testing.assert_close(logits(model, **inputs[0]), plain[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model, **inputs[1])[seen], plain[1][seen], rtol=1e-4, atol=1e-4)

    restore(model)
    assert all(torch.equal(logits(model, **x), y) for x, y in zip(inputs, plain, strict=True))


def test_keys_and_values_are_those_of_a_cache_that_quantizes():
    class Quantizing(DynamicLayer):
        def update(self, keys, values, *args, **kwargs):
            return super().update(quantizer(keys), quantizer(values), *args, **kwargs)

    quantizer, ids = parse("int4-g4"), text()
    model = causal_lm()
    with torch.no_grad():
        expected = model(ids, past_key_values=Cache(layers=[Quantizing() for _ in range(2)])).logits
    convert(model, Scheme(kv_cache="int4-g4"))
    assert torch.equal(logits(model, input_ids=ids), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_probabilities_are_those_of_an_eager_model_whose_softmax_is_quantized(name):
    quantizer, ids = parse("uint4-token"), text()

    class QuantizeSoftmax(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            y = function(*args, **(kwargs or {}))
            return quantizer(y) if function is F.softmax else y

    model = causal_lm(name, "eager")
    with QuantizeSoftmax():
        expected = logits(model, input_ids=ids, attention_mask=padded(ids))
    convert(model, Scheme(attention="uint4-token"))
    assert torch.equal(logits(model, input_ids=ids, attention_mask=padded(ids)), expected)


def test_every_implementation_gives_the_same_and_may_be_chosen_after_conversion():
    ids = text()
    model, seen = causal_lm("llama", "sdpa"), padded(ids).bool()
    convert(model, Scheme(kv_cache="int4-token", attention="uint8-token"))
    sdpa = logits(model, input_ids=ids, attention_mask=padded(ids))
    model.set_attn_implementation("eager")
    eager = logits(model, input_ids=ids, attention_mask=padded(ids))
    torch.testing.assert_close(sdpa[seen], eager[seen], rtol=1e-4, atol=1e-4)


def test_a_token_depends_on_no_later_one():
    model, ids = causal_lm(), text(1)
    convert(model, BOTH)
    other = ids.clone()
    other[0, 5:] = 31 - other[0, 5:]
    first, second = logits(model, input_ids=ids), logits(model, input_ids=other)
    assert torch.equal(first[:, :5], second[:, :5])
    assert not torch.allclose(first[:, 5:], second[:, 5:])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
def test_greedy_decoding_with_a_cache_is_the_full_forward(name):
    model, ids = causal_lm(name, "eager" if name == "gpt_oss" else "sdpa"), text(2, 4)
    convert(model, BOTH)
    decoded = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    full = ids
    for _ in range(8):
        full = torch.cat([full, logits(model, input_ids=full)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(decoded, full)


def test_vit_has_no_causal_mask_and_may_share_a_scale():
    torch.manual_seed(0)
    vit = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, intermediate_size=24, num_hidden_layers=1
    )
    vit.num_attention_heads = 2
    model, images = ViTForImageClassification(vit).eval(), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        plain = model(images).logits
        coverage = convert(model, Scheme(weight="int8", kv_cache="int8-tensor", attention="uint8-token"))
        quantized = model(images).logits
        switch(model, enabled=False)
        torch.testing.assert_close(model(images).logits, plain)
    assert 0 < (quantized - plain).abs().max() < 0.05
    assert [row.quantizers for row in coverage.rows if row.kind == "ViTAttention"] == [
        {"key": "int8-tensor", "value": "int8-tensor", "attention": "uint8-token"}
    ]


def test_learned_scales_and_projections_get_gradients():
    model, ids = causal_lm().train(), text()
    convert(model, Scheme(kv_cache="int4-tensor-lsq", attention="uint4-token"))
    attention = model.model.layers[0].self_attn
    for _, quantizer in quantizers_of(model):
        quantizer.initialize(torch.randn(4, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    for parameter in (
        attention.key_quantizer.scale.value,
        attention.value_quantizer.scale.value,
        attention.q_proj.weight,
        attention.k_proj.weight,
        attention.v_proj.weight,
    ):
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0


def test_bypassed_learned_scales_stay_in_the_graph():
    model, ids = causal_lm().train(), text()
    convert(model, Scheme(kv_cache="int4-tensor-lsq", attention="uint4-tensor-lsq"))
    switch(model, enabled=False)
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for _, quantizer in quantizers_of(model) for p in quantizer.learned()]
    assert len(grads) == 2 * 3
    assert all(grad is not None and not grad.any() for grad in grads)


def test_activation_checkpointing_gives_the_same_gradients():
    model, ids = causal_lm().train(), text()
    convert(model, Scheme(weight="int8", kv_cache="int4-token", attention="uint4-token"))
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_state_dict_copies_and_pickles():
    model, ids = causal_lm(), text()
    names = set(model.state_dict())
    convert(model, Scheme(weight="int8", kv_cache="int4-token", attention="uint8-token"))
    expected = logits(model, input_ids=ids)
    assert {key.split(".")[-2] for key in set(model.state_dict()) - names} == {
        "weight_quantizer",
        "key_quantizer",
        "value_quantizer",
        "attention_quantizer",
    }
    loaded = causal_lm()
    convert_like(loaded, model.state_dict())
    loaded.load_state_dict(model.state_dict())
    for copied in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied, input_ids=ids), expected)
    plain = pickle.loads(pickle.dumps(restore(model)))
    assert set(plain.state_dict()) == names


def test_coverage_of_a_scheme_without_weights():
    model = causal_lm()
    coverage = convert(model, Scheme(kv_cache="int8-token"))
    assert [row.name for row in coverage.converted] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert coverage.weight_share == 0
    assert "key int8-token, value int8-token" in coverage.table()
    assert convert(model, Scheme(kv_cache="int8-token")).table() == coverage.table()
    with pytest.raises(ValueError, match="converted already"):
        convert(model, Scheme(kv_cache="int4-token"))


def test_rules_may_give_each_layer_its_own():
    model = causal_lm()
    convert(model, {"*": Scheme("int8", kv_cache="int8-token"), "layers.1.self_attn": {"kv_cache": "int4-token"}})
    first, second = (layer.self_attn.key_quantizer for layer in model.model.layers)
    assert (first.format.bits, second.format.bits) == (8, 4)


@pytest.mark.parametrize("spec", ["int8-tensor", "nvfp4-g8"])
def test_one_scale_measured_over_all_tokens_is_refused(spec):
    with pytest.raises(ValueError, match=r"depend on later ones.*kv_cache='int8-token'"):
        convert(causal_lm(), Scheme(kv_cache=spec))


def test_groups_must_divide_the_head():
    with pytest.raises(ValueError, match="group size 3 does not divide 8 columns"):
        convert(causal_lm(), Scheme(kv_cache="int8-g3"))


def test_an_implementation_without_probabilities_is_refused():
    model = causal_lm("llama", "flex_attention")
    with pytest.raises(ValueError, match=r"'flex_attention' attention has no probabilities.*set_attn_impl.*'sdpa'"):
        convert(model, Scheme(attention="uint8-token"))
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"


class OwnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))


def test_attention_that_looks_up_no_function_is_refused():
    model = nn.Sequential(OwnAttention(), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"rule '\*' gives a kv_cache quantizer, but.*OwnAttention: it computes"):
        convert(copy.deepcopy(model), Scheme("int8", kv_cache="int8-token"))
    with pytest.raises(ValueError, match="it computes attention by itself; kv_cache"):
        convert(copy.deepcopy(model), {"*": "int8", "type:OwnAttention": {"kv_cache": "int8-token"}})
    coverage = convert(model, "int8")  # its projections are layers like all others
    assert [row.name for row in coverage.converted] == ["0.qkv", "1"]
    assert "OwnAttention" not in coverage.table()


def test_a_placement_that_no_layer_has_is_an_error():
    with pytest.raises(ValueError, match=r"rule '\*' gives a kv_cache quantizer, but no layer.*leave kv_cache out"):
        convert(nn.Sequential(nn.Linear(4, 4)), Scheme("int8", kv_cache="int8-token"))


# torch.compile builds an instance of the autograd function it traces and is warned by torch for it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_no_graph_break_under_torch_compile():
    model = causal_lm()
    convert(model, BOTH)
    layer, x = model.model.layers[0].self_attn, torch.randn(1, 5, 16)
    positions = model.model.rotary_emb(x, torch.arange(5)[None])
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, positions, None)[0], layer(x, positions, None)[0])
