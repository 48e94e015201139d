"""torchao artifacts compute what was trained, through transformers and as a state dict of any module."""

import pytest
import torch
from safetensors.torch import load_file
from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor
from transformers import AutoModelForCausalLM

from qlightning.export.commands import export_module
from qlightning.export.torchao import load_state_dict
from qlightning.layers.scheme import Scheme

WEIGHTS = ["int4-g32", "int3-g16-asym", "int4-tensor-lsq", "binary"]


@pytest.mark.parametrize("spec", WEIGHTS)
def test_weights_through_transformers(kit, spec):
    module = kit.llama(spec)
    proof = export_module(module, "torchao", kit.out)
    assert proof.passed
    assert str(proof.tolerance) == "0 ulp"
    loaded = AutoModelForCausalLM.from_pretrained(kit.out).requires_grad_(False)
    assert isinstance(loaded.model.layers[0].mlp.up_proj.weight, IntxUnpackedToInt8Tensor)
    assert torch.equal(loaded(kit.ids()).logits, kit.logits(module, kit.ids()))


@pytest.mark.parametrize("spec", ["int8-asym"])
def test_in_bfloat16(kit, spec):
    module = kit.llama(spec, dtype=torch.bfloat16)
    proof = export_module(module, "torchao", kit.out)
    assert proof.passed
    assert str(proof.tolerance) == "0 ulp"


@pytest.mark.parametrize(
    ("weight", "input", "kind"),
    [
        ("int4-g32", "int8-token-asym", IntxUnpackedToInt8Tensor),
        ("int8", "int8-token-asym", IntxUnpackedToInt8Tensor),
        ("int8", "int8-token", Int8Tensor),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dynamic_inputs(kit, weight, input, kind, dtype):
    module = kit.llama(Scheme(weight, input=input), dtype=dtype)
    proof = export_module(module, "torchao", kit.out)
    assert proof.passed
    assert "reciprocal" in str(proof.tolerance)
    loaded = AutoModelForCausalLM.from_pretrained(kit.out, dtype="auto")
    assert isinstance(loaded.model.layers[0].mlp.up_proj.weight, kind)


def test_mixed_bits_and_skipped_layers(kit):
    module = kit.llama({"*": "int4-g32", "mlp.down_proj": "int8", "mlp.up_proj": None})
    proof = export_module(module, "torchao", kit.out)
    assert proof.passed
    loaded = AutoModelForCausalLM.from_pretrained(kit.out).requires_grad_(False)
    layers = loaded.model.layers
    assert layers[0].mlp.down_proj.weight.target_dtype == torch.int8
    assert layers[0].mlp.gate_proj.weight.target_dtype == torch.int4
    assert type(layers[0].mlp.up_proj.weight) is torch.nn.Parameter
    assert torch.equal(loaded(kit.ids()).logits, kit.logits(module, kit.ids()))


@pytest.mark.parametrize("spec", ["int4-g16", "int5-asym"])
def test_a_state_dict_for_a_module_of_one_s_own(kit, spec):
    module = kit.plain(spec)
    proof = export_module(module, "torchao", kit.out)
    assert proof.passed
    assert len(proof.layers) == 3
    plain = kit.Plain()
    plain.load_state_dict(load_state_dict(kit.out), assign=True)
    x = torch.randn(3, 32)
    with torch.no_grad():
        assert torch.equal(plain.eval().requires_grad_(False)(x), module(x))
    stored = load_file(kit.out / "model.safetensors")
    weight = module.net[0].quantizer("weight").quantize(module.net[0].weight)
    assert torch.equal(stored["net.0._weight_qdata"], weight.codes)
