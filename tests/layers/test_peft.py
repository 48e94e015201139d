"""LoRA around converted layers: adapters stay in float, the base is quantized, learned scales stay trainable."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from qlightning.layers.convert import convert, quantizers_of, restore
from qlightning.layers.linear import LinearTwin
from qlightning.layers.swap import convert_like
from qlightning.numerics.spec import parse

SPEC = "int3-channel-lsq"
IDS = torch.arange(20).remainder(16).view(2, 10)
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft, of transformers


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=2))


def lora(model: nn.Module, **options: object) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(
        r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    for name, value in options.items():
        setattr(config, name, value)
    return get_peft_model(model, config)


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def layer_of(model: nn.Module) -> nn.Module:
    return model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")


@pytest.fixture(params=["converted after LoRA", "converted before LoRA"])
def model(request) -> PeftModel:
    if request.param == "converted after LoRA":
        wrapped = lora(llama())
        convert(wrapped, SPEC)
        return wrapped
    base = llama()
    convert(base, SPEC)
    return lora(base)


def test_adapters_are_left_alone_and_the_base_is_converted(model):
    coverage = convert(model, SPEC)
    rows = {row.name.removeprefix("base_model.model.model.layers.0."): row for row in coverage.rows}
    assert rows["mlp.down_proj"].quantizers
    assert not [name for name in rows if "base_layer" in name]
    adapters = [row for name, row in rows.items() if "lora_" in name]
    assert len(adapters) == 4
    assert all(row.reason == "adapter" and not row.quantizers for row in adapters)
    assert isinstance(layer_of(model).base_layer, LinearTwin)
    assert not any(isinstance(part, LinearTwin) for part in layer_of(model).lora_A.values())
    assert len(list(quantizers_of(model))) == 7


def test_learned_scales_are_trainable_however_the_model_was_wrapped(model):
    convert(model, SPEC)  # idempotent; gives scales back what a PEFT wrapper froze
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name or "_quantizer." in name}
    assert len(moved) == 2 * 2 + 7


def test_the_adapter_is_added_outside_the_quantizer(model):
    layer, x = layer_of(model), torch.randn(3, 24)
    base = layer.base_layer
    quantizer = base.weight_quantizer
    down, up, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    expected = x @ quantizer(base.weight).T + scaling * (x @ down.T) @ up.T
    torch.testing.assert_close(layer(x), expected)


def test_a_disabled_adapter_leaves_the_quantized_base(model):
    base = llama()
    convert(base, SPEC)
    assert not torch.allclose(logits(model), logits(base), atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))


def test_merging_quantizes_anew_what_was_added_outside(model):
    layer, x = layer_of(model), torch.randn(3, 24)
    outside, delta = layer(x).detach(), layer.get_delta_weight("default")
    weight = (layer.base_layer.weight + delta).detach()
    merged = model.merge_and_unload()
    down_proj = merged.model.layers[0].mlp.down_proj
    assert isinstance(down_proj, LinearTwin)
    torch.testing.assert_close(down_proj(x), x @ down_proj.weight_quantizer(weight).T)  # Q(W + B A), not Q(W) + B A
    change = (down_proj(x) - outside).norm() / outside.norm()
    assert 0.01 < change < 1
    assert not [name for name in merged.state_dict() if "lora_" in name]
    assert type(restore(merged).model.layers[0].mlp.down_proj) is nn.Linear


def test_adapters_are_saved_and_loaded_beside_a_converted_base(model, tmp_path):
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert all("lora_" in key for key in file.keys())  # scales belong to the base's checkpoint  # noqa: SIM118
    base = llama()
    convert(base, SPEC)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_the_whole_state_dict_loads_into_a_fresh_wrapper(model):
    fresh = lora(llama())
    convert_like(fresh, model.state_dict())
    for parameter in fresh.parameters():
        nn.init.normal_(parameter)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))


def test_a_wrapped_output_head_stays_in_float_by_default():
    model = lora(llama(), modules_to_save=["lm_head"])
    coverage = convert(model, "int4-g8")
    heads = {row.name: row for row in coverage.rows if "lm_head" in row.name}
    assert heads["base_model.model.lm_head"].reason == "output head, in float by default"
    assert [row.reason for name, row in heads.items() if "modules_to_save" in name] == ["adapter"]


def test_rules_name_layers_without_what_peft_puts_in_between():
    model = lora(llama())
    convert(model, {"mlp.down_proj": "int8", "layers.0.self_attn.*": "int4-g8"}, min_coverage=0)
    assert layer_of(model).base_layer.weight_quantizer == parse("int8")
    assert layer_of(model).lora_A["default"].weight.requires_grad
