"""compressed-tensors artifacts load with `AutoModelForCausalLM.from_pretrained` and compute what was trained."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlightning.export.commands import export_module
from qlightning.layers.scheme import Scheme

INTEGERS = [
    "int4-g32",
    "int3-g32",
    "int8",
    "int2-g16-mse",
    "int4-lsq",
    "int5-tensor",
    "ternary",
    "binary",
    "int4-narrow",
]


@pytest.mark.parametrize("spec", INTEGERS)
def test_integer_weights(kit, spec):
    module = kit.llama(spec)
    proof = export_module(module, "compressed-tensors", kit.out)
    assert proof.passed
    assert str(proof.tolerance) == "0 ulp"
    assert len(proof.layers) == 14
    loaded = AutoModelForCausalLM.from_pretrained(kit.out)
    assert torch.equal(loaded(kit.ids()).logits, kit.logits(module, kit.ids()))


@pytest.mark.parametrize("spec", ["int4-g32", "nvfp4", "mxfp4", "fp8e4m3", "fp8e4m3-b16x32", "int8"])
def test_in_bfloat16(kit, spec):
    module = kit.llama(spec, dtype=torch.bfloat16)
    proof = export_module(module, "compressed-tensors", kit.out)
    assert proof.passed
    assert str(proof.tolerance) == "0 ulp"
    loaded = AutoModelForCausalLM.from_pretrained(kit.out, dtype="auto")
    assert torch.equal(loaded(kit.ids()).logits, kit.logits(module, kit.ids()))


INPUTS = [
    ("int8", "int8-token"),
    ("int4-g32", "int8-token"),
    ("fp8e4m3", "fp8e4m3-token"),
    ("int8", "int8-token-asym"),
]


@pytest.mark.parametrize(("weight", "input"), INPUTS)
def test_dynamic_inputs(kit, weight, input):
    module = kit.llama(Scheme(weight, input=input))
    proof = export_module(module, "compressed-tensors", kit.out)
    assert proof.passed
    assert str(proof.tolerance) == "0 ulp"
    loaded = AutoModelForCausalLM.from_pretrained(kit.out)
    assert torch.equal(loaded(kit.ids()).logits, kit.logits(module, kit.ids()))
