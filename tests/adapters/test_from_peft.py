"""PEFT's LoRA inside the quantizer, on models as users have them."""

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, GPT2Config, LlamaConfig, LlamaForCausalLM

from qlightning import Scheme, convert, restore
from qlightning.adapters import FromPEFT, LoRA
from qlightning.layers.linear import LinearTwin
from qlightning.layers.peft import LoraTwin
from qlightning.layers.swap import convert_like
from qlightning.numerics import parse

SPEC = "int3-channel-lsq"
INSIDE = {"*": Scheme(SPEC, adapter="peft")}
IDS = torch.arange(20).remainder(16).view(2, 10)
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft, of transformers


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))


def config(**options: Any) -> LoraConfig:
    given = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    return LoraConfig(**{**given, **options})


def lora(model: nn.Module | None = None, **options: Any) -> PeftModel:
    base = llama() if model is None else model
    torch.manual_seed(1)
    return get_peft_model(base, config(**options))


@pytest.fixture
def model() -> PeftModel:
    wrapped = lora()
    convert(wrapped, INSIDE)
    return wrapped


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def layer_of(model: nn.Module) -> Any:
    return model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")


def merged_by_hand(layer: Any, *names: str) -> Tensor:
    weight = layer.base_layer.weight.detach().clone()
    for name in names:
        weight += layer.get_delta_weight(name).detach()  # as PEFT's merge does: in place
    return weight


def test_the_layer_is_the_quantized_sum_and_has_no_branch_of_its_own(model: PeftModel) -> None:
    layer, x = layer_of(model), torch.randn(3, 24)
    seen: list[Tensor] = []
    layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(x))
    quantizer = layer.base_layer.weight_quantizer
    assert torch.equal(layer(x), F.linear(x, quantizer(merged_by_hand(layer, "default"))))
    assert not seen


def test_gradients_are_those_of_the_composed_formula(model: PeftModel) -> None:
    layer, x = layer_of(model), torch.randn(5, 24)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    quantizer, scaling = layer.base_layer.weight_quantizer, layer.scaling["default"]
    step = quantizer.scale.value
    expected = F.linear(x, quantizer(layer.base_layer.weight + (b @ a) * scaling))
    y = layer(x)
    grad = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, [a, b, step], grad), torch.autograd.grad(expected, [a, b, step], grad), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_only_adapters_and_scales_are_trained(model: PeftModel) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name or "_quantizer." in name}
    assert len(moved) == 2 * 2 + 7


def test_the_scale_starts_from_what_its_quantizer_sees(model: PeftModel) -> None:
    layer = layer_of(model)
    expected = parse(SPEC)
    expected.build((16, 24))
    expected.initialize(merged_by_hand(layer, "default"))
    assert torch.equal(layer.base_layer.weight_quantizer.scale.value, expected.scale.value)


def test_without_the_choice_the_adapter_stays_outside() -> None:
    model = lora()
    convert(model, SPEC)
    layer, x = layer_of(model), torch.randn(3, 24)
    assert not isinstance(layer, LoraTwin)
    outside = F.linear(x, layer.base_layer.weight_quantizer(layer.base_layer.weight))
    outside = outside + layer.lora_B["default"](layer.lora_A["default"](x)) * 4
    assert torch.allclose(layer(x), outside, atol=1e-6)


def test_a_disabled_adapter_leaves_the_quantized_base(model: PeftModel) -> None:
    layer, x, acting = layer_of(model), torch.randn(3, 24), logits(model)
    with model.disable_adapter():
        off = logits(model)
        assert torch.equal(layer(x), F.linear(x, layer.base_layer.weight_quantizer(layer.base_layer.weight)))
    assert not torch.allclose(off, acting)
    assert torch.equal(logits(model), acting)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_changes_no_bit(dtype: torch.dtype, safe: bool) -> None:
    """PEFT keeps adapters of a bfloat16 model in float32, and its two merges round them differently."""
    model = lora(llama().to(dtype))
    assert layer_of(model).lora_A["default"].weight.dtype == torch.float32
    convert(model, INSIDE)
    trained = logits(model)
    model.merge_adapter(safe_merge=safe)
    assert torch.equal(logits(model), trained)
    model.unmerge_adapter()
    fresh = lora(llama().to(dtype))
    convert_like(fresh, model.state_dict())
    fresh.load_state_dict(model.state_dict())
    again = logits(fresh)
    merged = fresh.merge_and_unload(safe_merge=safe)
    down_proj = merged.model.layers[0].mlp.down_proj
    assert isinstance(down_proj, LinearTwin)
    assert not [name for name in merged.state_dict() if "lora_" in name]
    assert torch.equal(logits(merged), again)
    stored = down_proj.weight_quantizer.quantize(down_proj.weight.detach())
    values = down_proj.weight_quantizer.dequantize(stored, dtype)
    plain = restore(merged)
    assert type(plain.model.layers[0].mlp.down_proj) is nn.Linear
    with torch.no_grad():
        assert torch.equal(down_proj.weight, merged.model.layers[0].mlp.down_proj.weight)
        plain.model.layers[0].mlp.down_proj.weight.copy_(values)
    assert plain.model.layers[0].mlp.down_proj(torch.ones(1, 24, dtype=dtype)).isfinite().all()


def test_a_broken_adapter_is_not_merged_safely(model: PeftModel) -> None:
    layer = layer_of(model)
    before = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="nothing was merged"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


def test_several_adapters_and_which_are_active() -> None:
    torch.manual_seed(0)
    base = AutoModel.from_config(llama().config)
    model = get_peft_model(base, config())
    convert(model, INSIDE)
    model.add_adapter("second", config(r=3, lora_alpha=3))
    layer, x = model.get_submodule("base_model.model.layers.0.mlp.down_proj"), torch.randn(3, 24)
    quantizer = layer.base_layer.weight_quantizer
    for names in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(names)
        assert torch.equal(layer(x), F.linear(x, quantizer(merged_by_hand(layer, *names))))
    y = layer(x)
    model.merge_adapter()
    assert torch.equal(layer(x), y)


def test_conv1d_of_gpt2() -> None:
    torch.manual_seed(0)
    base = AutoModel.from_config(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=16, n_positions=16))
    model = get_peft_model(base, config(target_modules=["c_attn"], fan_in_fan_out=True))
    convert(model, INSIDE)
    layer, x = model.get_submodule("base_model.model.h.0.attn.c_attn"), torch.randn(3, 16)
    y = layer(x)
    delta = layer.get_delta_weight("default")
    expected = layer.base_layer.weight_quantizer((layer.base_layer.weight + delta).t())
    assert torch.allclose(y, F.linear(x, expected, layer.base_layer.bias))
    layer.merge()
    assert torch.equal(layer(x), y)


def test_copies_and_pickles_are_on_their_own(model: PeftModel) -> None:
    trained = logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), trained)
        with torch.no_grad():
            layer_of(other).lora_B["default"].weight.zero_()
        assert not torch.equal(logits(other), trained)
        assert torch.equal(logits(model), trained)


def test_checkpoints_load_without_naming_the_method(model: PeftModel) -> None:
    fresh = lora()
    convert_like(fresh, model.state_dict())
    for parameter in fresh.parameters():
        nn.init.normal_(parameter)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))
    assert isinstance(layer_of(fresh), LoraTwin)


def test_a_merged_model_loads_without_peft(model: PeftModel) -> None:
    trained = logits(model)
    merged = model.merge_and_unload()
    fresh = llama()
    convert_like(fresh, merged.state_dict())
    fresh.load_state_dict(merged.state_dict())
    assert torch.equal(logits(fresh), trained)


def test_unloading_leaves_the_quantized_base_and_keeps_nothing_of_the_adapter(model: PeftModel) -> None:
    with model.disable_adapter():
        off = logits(model)
    gone = weakref.ref(layer_of(model).lora_A["default"].weight)
    base = model.unload()
    assert torch.equal(logits(base), off)
    down_proj = base.model.layers[0].mlp.down_proj
    assert torch.equal(down_proj.effective("weight"), down_proj.weight)
    del model
    gc.collect()
    assert gone() is None


def test_peft_saves_and_loads_the_adapter_as_ever(model: PeftModel, tmp_path: Any) -> None:
    model.save_pretrained(tmp_path)
    base = llama()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    convert(loaded, INSIDE)
    assert torch.equal(logits(loaded), logits(model))


def test_restore_gives_peft_its_layer_back(model: PeftModel) -> None:
    plain = lora()
    restore(model)
    assert not any(isinstance(layer, LoraTwin | LinearTwin) for layer in model.modules())
    assert torch.equal(logits(model), logits(plain))
    assert list(model.state_dict()) == list(plain.state_dict())


def test_converting_again_changes_nothing(model: PeftModel) -> None:
    trained = logits(model)
    coverage = convert(model, INSIDE)
    assert torch.equal(logits(model), trained)
    rows = {row.name.removeprefix("base_model.model.model.layers.0."): row for row in coverage.rows}
    assert rows["mlp.down_proj"].parts == {"adapter": "FromPEFT()"}
    assert not rows["mlp.up_proj"].parts
    assert "adapter FromPEFT()" in coverage.table()
    with pytest.raises(ValueError, match="converted already"):
        convert(model, SPEC)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, r"LoraConfig\(..., lora_dropout=0.0\)"),
        ({"use_dora": True}, r"LoraConfig\(..., use_dora=False\)"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "LoRA of a linear layer can"),
    ],
)
def test_what_is_more_than_an_update_of_the_weight_is_refused(options: dict[str, Any], message: str) -> None:
    model = lora(**options)
    rules = INSIDE | ({"embed_tokens": Scheme("int8", adapter="peft")} if "target_modules" in options else {})
    with pytest.raises(ValueError, match=message):
        convert(model, rules)
    assert not any(isinstance(layer, LinearTwin) for layer in model.modules())


def test_a_bias_of_the_adapter_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["fc"], lora_bias=True))
    with pytest.raises(ValueError, match="lora_bias=False"):
        convert(model, INSIDE)


def test_an_adapter_that_is_added_later_is_refused_when_it_acts(model: PeftModel) -> None:
    model.add_adapter("second", config(lora_dropout=0.5))
    logits(model)
    model.set_adapter("second")
    with pytest.raises(ValueError, match=r"lora_dropout=0\.0"):
        logits(model)


def test_adapters_by_row_are_refused(model: PeftModel) -> None:
    with pytest.raises(ValueError, match="set_adapter"):
        layer_of(model)(torch.randn(2, 24), adapter_names=["default", "__base__"])


def test_a_model_without_peft_is_told_what_to_write() -> None:
    with pytest.raises(ValueError, match="get_peft_model"):
        convert(llama(), INSIDE)
    with pytest.raises(ValueError, match="adapter='peft'"):
        Scheme(SPEC, adapter="PEFT")
    with pytest.raises(ValueError, match="adapter='peft'"):
        convert(lora(), {"*": Scheme(SPEC, adapter=LoRA(2))})


def test_a_model_without_peft_gets_what_was_meant_otherwise() -> None:
    meant = {"*": Scheme(SPEC, adapter=FromPEFT(otherwise=LoRA(2)))}
    plain, wrapped = llama(), lora()
    assert {row.parts.get("adapter") for row in convert(plain, meant).converted} == {"LoRA(2)"}
    assert {row.parts.get("adapter") for row in convert(wrapped, meant).converted} == {"FromPEFT()", None}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_without_a_break(model: PeftModel) -> None:
    layer, x = layer_of(model), torch.randn(3, 24)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert torch.allclose(y, layer(x), atol=1e-6)
    y.sum().backward()
    assert layer.lora_B["default"].weight.grad is not None
