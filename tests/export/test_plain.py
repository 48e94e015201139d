"""Plain artifacts load in their own libraries and compute what was trained, bit for bit."""

import weakref

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlightning.export.commands import export_module
from qlightning.export.trained import Weight


def test_a_llama_loads_with_transformers(kit):
    module = kit.llama()
    proof = export_module(module, "plain", kit.out)
    assert proof.passed
    assert proof.outputs.largest == 0
    assert len(proof.layers) == 7
    loaded = AutoModelForCausalLM.from_pretrained(kit.out)
    assert torch.equal(loaded(kit.ids()).logits, kit.logits(module, kit.ids()))


@pytest.mark.parametrize("spec", ["int4-g16", "nvfp4", "nf4-g32", "int8-asym", "fp6e3m2-b1x8"])
def test_a_module_of_one_s_own_loads_its_state_dict(kit, spec):
    module = kit.plain(spec)
    proof = export_module(module, "plain", kit.out)
    assert proof.passed
    plain = kit.Plain()
    plain.load_state_dict(load_file(kit.out / "model.safetensors"))
    x = torch.randn(3, 32)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), module(x))


def test_shards(kit):
    module = kit.llama()
    assert export_module(module, "plain", kit.out, options={"shard_bytes": 50_000}).passed
    assert len(list(kit.out.glob("model-*.safetensors"))) > 2
    assert torch.equal(AutoModelForCausalLM.from_pretrained(kit.out)(kit.ids()).logits, kit.logits(module, kit.ids()))


def test_activations_are_dropped_only_if_asked(kit):
    module = kit.llama({"*": {"weight": "int4-g32", "input": "int8-token", "kv_cache": "int8-token"}})
    with pytest.raises(ValueError, match=r"drop=\['kv_cache', 'input'\]|drop=\['input', 'kv_cache'\]"):
        export_module(module, "plain", kit.out)
    proof = export_module(module, "plain", kit.out, drop=["kv_cache", "input"])
    assert proof.passed
    assert proof.cost < 60


def test_no_more_than_one_tensor_at_a_time(kit, monkeypatch):
    """Streamed: what was written is gone before the next weight is made."""
    alive, most = weakref.WeakSet(), []
    own = Weight.values

    def values(self, dtype=None):
        tensor = own(self, dtype)
        alive.add(tensor)
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(Weight, "values", values)
    export_module(kit.llama(), "plain", kit.out)
    assert len(most) == 7
    assert max(most) == 1
