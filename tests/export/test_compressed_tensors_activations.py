"""Quantized caches of keys and values are what compressed-tensors computes with, in one pass and token by token."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlightning.export.commands import export_module
from qlightning.layers.layer import Twin
from qlightning.layers.scheme import Scheme


def cached(kit, spec, *, dtype=torch.float32, rules=None, **config):
    module = kit.llama(rules or Scheme("int4-g32", kv_cache=spec), dtype=dtype, num_hidden_layers=2, **config)
    for layer in module.modules():
        if isinstance(layer, Twin) and layer.quantizer("key") is not None:
            layer.quantizer("key").initialize(torch.linspace(-2.5, 3, 64)[None])
            layer.quantizer("value").initialize(torch.linspace(-1, 1.2, 64)[None])
    return module


@pytest.mark.parametrize("spec", ["int8-tensor-lsq", "fp8e4m3-tensor-ema"])
def test_the_cache_is_what_was_trained(kit, spec):
    module = cached(kit, spec)
    proof = export_module(module, "compressed-tensors", kit.out)
    assert proof.passed
    assert str(proof.tolerance) == "0 ulp"
    tensors = load_file(kit.out / "model.safetensors")
    assert {name for name in tensors if name.endswith(("k_scale", "v_scale"))} == {
        f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("k_scale", "v_scale")
    }
    assert tensors["model.layers.0.self_attn.k_scale"] != tensors["model.layers.0.self_attn.v_scale"]
    scheme = json.loads((kit.out / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"]) == (8, "int" if "int8" in spec else "float")
    assert (scheme["strategy"], scheme["dynamic"], scheme["symmetric"]) == ("tensor", False, True)
    loaded = AutoModelForCausalLM.from_pretrained(kit.out).requires_grad_(False)
    theirs, ours = (m.generate(kit.ids(), max_new_tokens=8, do_sample=False) for m in (loaded, module.model))
    assert torch.equal(theirs, ours)
    without = kit.llama(num_hidden_layers=2)
    assert not torch.allclose(kit.logits(without, kit.ids()), kit.logits(module, kit.ids()), atol=1e-3)


def test_in_bfloat16_and_with_inputs(kit):
    rules = {"*": {"weight": "int8-sbf16", "input": "int8-token", "kv_cache": "fp8e4m3-tensor-lsq"}}
    proof = export_module(cached(kit, "", dtype=torch.bfloat16, rules=rules), "compressed-tensors", kit.out)
    assert proof.passed
    assert proof.outputs.sqnr > 20


def test_dropped(kit):
    module = cached(kit, "int4-tensor-lsq")
    with pytest.raises(ValueError, match=r"--drop kv_cache"):
        export_module(module, "compressed-tensors", kit.out)
    assert export_module(module, "compressed-tensors", kit.out, drop=["kv_cache"]).without == ["kv_cache"]
    assert "kv_cache_scheme" not in json.loads((kit.out / "config.json").read_text())["quantization_config"]


def test_one_scheme_for_all(kit):
    rules = {"*": {"weight": "int4-g32"}, "layers.0.*": {"weight": "int4-g32", "kv_cache": "int8-tensor-lsq"}}
    with pytest.raises(ValueError, match="but 1 of 2 have 1: train with one kv_cache= for all, or for none"):
        export_module(cached(kit, "", rules=rules), "compressed-tensors", kit.out)
