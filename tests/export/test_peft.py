"""Adapters outside of quantizers lie beside the base, and PEFT itself computes with them what was trained."""

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlightning.export.artifact import MANIFEST, write_manifest
from qlightning.export.commands import export_module, verify_module

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft, of transformers
    pytest.mark.filterwarnings("ignore:.*bitsandbytes:UserWarning"),
]

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


def adapted(kit, rules="int4-g32", *, dtype=torch.float32, **config):
    """A LightningModule with a quantized base that PEFT has wrapped, with adapters that are not zero."""
    module = kit.llama(rules, dtype=dtype)
    module.model = get_peft_model(module.model, LoraConfig(**{**LORA, **config}))
    return module.eval()


@pytest.mark.parametrize(
    ("format", "rules"),
    [
        ("plain", "int4-g32"),
        ("compressed-tensors", {"*": {"weight": "int4-g32", "input": "int8-token"}}),
        ("torchao", "int4-g32"),
        ("bitsandbytes", "nf4-g32"),
    ],
)
def test_peft_reads_what_was_trained(kit, format, rules):
    module = adapted(kit, rules)
    before = kit.logits(module, kit.ids())
    proof = export_module(module, format, kit.out)
    assert proof.passed
    assert str(proof.tolerance) == "0 ulp"
    assert len(proof.layers) == 7
    assert torch.equal(kit.logits(module, kit.ids()), before)
    base = AutoModelForCausalLM.from_pretrained(kit.out)
    with torch.no_grad():
        alone = base(kit.ids()).logits
    loaded = PeftModel.from_pretrained(base, kit.out / "adapter").eval().requires_grad_(False)
    assert torch.equal(loaded(kit.ids()).logits, before)
    assert not torch.allclose(alone, before, atol=0.1)
    assert not [name for name in load_file(kit.out / "model.safetensors") if "lora" in name or "base_layer" in name]
    config = json.loads((kit.out / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"], config["inference_mode"]) == ("LORA", None, True)
    assert verify_module(module, kit.out).passed


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
def test_in_bfloat16_with_adapters_of_either_dtype(kit, adapters):
    module = adapted(kit, dtype=torch.bfloat16)
    for name, parameter in module.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.to(adapters)
    proof = export_module(module, "plain", kit.out)
    assert proof.passed
    assert str(proof.tolerance) == "0 ulp"
    assert {t.dtype for t in load_file(kit.out / "adapter" / "adapter_model.safetensors").values()} == {adapters}


def test_a_changed_adapter_fails(kit):
    module = adapted(kit)
    export_module(module, "plain", kit.out)
    path = kit.out / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "q_proj.lora_B" in name)
    tensors[name][3] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    write_manifest(kit.out, json.loads((kit.out / MANIFEST).read_text()))  # as if that were what was written
    proof = verify_module(module, kit.out)
    assert not proof.passed
    assert [d.name for d in proof.layers if d.largest] == ["model.layers.0.self_attn.q_proj"]


def test_two_adapters_of_which_one_is_active(kit):
    module = adapted(kit)
    module.model.add_adapter("french", LoraConfig(**{**LORA, "target_modules": ["up_proj"]}))
    module.model.set_adapter("french")
    before = kit.logits(module.eval(), kit.ids())
    assert export_module(module, "plain", kit.out).passed
    base = AutoModelForCausalLM.from_pretrained(kit.out)
    loaded = PeftModel.from_pretrained(base, kit.out / "adapter" / "french").eval().requires_grad_(False)
    assert torch.equal(loaded(kit.ids()).logits, before)
    assert (kit.out / "adapter" / "adapter_model.safetensors").is_file()


def test_another_kind_and_a_module_beside(kit):
    module = kit.llama()
    config = IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], modules_to_save=["lm_head"]
    )
    module.model = get_peft_model(module.model, config)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "ia3" in name or "modules_to_save" in name:
                parameter.add_(0.3)
    module.eval()
    before = kit.logits(module, kit.ids())
    assert export_module(module, "compressed-tensors", kit.out).passed
    tensors = load_file(kit.out / "adapter" / "adapter_model.safetensors")
    assert [name for name in tensors if "lm_head" in name] == ["base_model.model.lm_head.weight"]
    assert torch.equal(kit.logits(module, kit.ids()), before)


def test_what_has_no_place_for_adapters(kit):
    with pytest.raises(ValueError, match=r"gguf has no place for PEFT's adapters outside .*adapter='peft'.*plain"):
        export_module(adapted(kit, "gguf-q4_0"), "gguf", kit.out)
    plain = kit.plain()
    plain.net = get_peft_model(plain.net, LoraConfig(**{**LORA, "target_modules": ["0"]}))
    with pytest.raises(ValueError, match="export a model of transformers as one of bitsandbytes"):
        export_module(plain.eval(), "plain", kit.out)
    assert not kit.out.exists()


def test_merged_into_weights_it_is_refused(kit):
    module = adapted(kit)
    module.model.merge_adapter()
    with pytest.raises(ValueError, match=r"did not see it in training: call peft_model.unmerge_adapter\(\)"):
        export_module(module, "plain", kit.out)


def test_a_whole_layer_is_saved_in_float_alone(kit):
    with pytest.raises(ValueError, match=r"PEFT saves lm_head as a whole .*rules=\{'lm_head': None\}"):
        export_module(adapted(kit, {"*": "int4-g32", "lm_head": "int8"}, modules_to_save=["lm_head"]), "plain", kit.out)
    assert export_module(
        adapted(kit, {"*": "int4-g32", "lm_head": None}, modules_to_save=["lm_head"]), "plain", kit.out
    )


def test_what_is_no_layer_around_a_layer_is_refused(kit):
    module = kit.llama()
    prompts = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    module.model = get_peft_model(module.model, prompts)
    with pytest.raises(ValueError, match="train an adapter of layers, LoraConfig"):
        export_module(module.eval(), "plain", kit.out)
    module = kit.llama()
    module.model.add_adapter(LoraConfig(**LORA))
    with pytest.raises(ValueError, match=r"get_peft_model\(model, config\)"):
        export_module(module.eval(), "plain", kit.out)
