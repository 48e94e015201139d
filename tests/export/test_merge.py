"""Adapters inside quantizers are merged without a trace; those outside are left as they are."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from qlightning.export.commands import export_module
from qlightning.export.merge import has_adapters, merge_adapters
from qlightning.layers.convert import convert
from qlightning.layers.scheme import Scheme

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft, of transformers


def adapted(kit, scheme):
    """A LightningModule whose model PEFT has wrapped, with adapters that are not zero."""
    torch.manual_seed(0)
    module = kit.llama("int4-g32") if scheme is None else kit.Task(kit.LLAMA)
    if scheme is not None:
        module.configure_model()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    module.model = get_peft_model(module.model, config)
    if scheme is not None:
        convert(module, scheme, min_coverage=0)
    return module.eval()


@pytest.mark.parametrize("format", ["plain", "compressed-tensors"])
def test_inside_the_quantizer_the_merge_is_exact(kit, format):
    module = adapted(kit, Scheme("int4-g32", adapter="peft"))
    before = kit.logits(module, kit.ids())
    proof = export_module(module, format, kit.out)
    assert proof.passed
    assert str(proof.tolerance) == "0 ulp"
    assert has_adapters(module)  # a copy was merged
    assert torch.equal(kit.logits(module, kit.ids()), before)
    loaded = AutoModelForCausalLM.from_pretrained(kit.out).requires_grad_(False)
    assert torch.equal(loaded(kit.ids()).logits, before)
    assert not [name for name in load_file(kit.out / "model.safetensors") if "lora" in name or "base_layer" in name]
    with torch.no_grad(), module.model.disable_adapter():
        assert not torch.equal(kit.logits(module, kit.ids()), before)


def test_in_place(kit):
    module = adapted(kit, Scheme("int4-g32", adapter="peft"))
    before = kit.logits(module, kit.ids())
    assert merge_adapters(module, in_place=True) is module
    assert not has_adapters(module)
    assert torch.equal(kit.logits(module, kit.ids()), before)


def test_inside_and_outside_at_once_is_refused(kit):
    rules = {"*": Scheme("int4-g32", adapter="peft"), "down_proj": None}
    with pytest.raises(ValueError, match=r"outside of the quantizer in 1 layers .*LoraConfig\(target_modules="):
        merge_adapters(adapted(kit, rules))


def test_outside_they_stay(kit):
    module = adapted(kit, None)
    assert merge_adapters(module) is module
    assert has_adapters(module)


def test_a_module_without_adapters_is_itself():
    module = nn.Sequential(nn.Linear(4, 4))
    assert merge_adapters(module) is module
