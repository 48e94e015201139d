"""bitsandbytes' Linear4bit computes what was trained, from our codes."""

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import get_4bit_type, has_avx512bf16, quantize_4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlightning.export.bitsandbytes import FP4, load
from qlightning.export.commands import export_module
from qlightning.export.target import EXACT
from qlightning.numerics.codebooks import NF4, Levels
from qlightning.numerics.granularity import PerGroup
from qlightning.numerics.quantizer import Quantizer

SPECS = {"nf4": "nf4-g32", "fp4": Quantizer(Levels(FP4), PerGroup(32))}


def test_the_tables_are_its_own():
    assert tuple(get_4bit_type("nf4", device="cpu").tolist()) == NF4
    theirs = sorted(set(get_4bit_type("fp4", device="cpu").tolist()))
    assert torch.equal(torch.tensor(FP4), torch.tensor(theirs))


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_through_transformers(kit, kind, dtype):
    module = kit.llama(SPECS[kind], dtype=dtype)
    proof = export_module(module, "bitsandbytes", kit.out)
    assert proof.passed
    if not has_avx512bf16():  # whose kernel computes in bfloat16
        assert proof.tolerance == EXACT
    assert len(proof.layers) == 7
    loaded = AutoModelForCausalLM.from_pretrained(kit.out, dtype="auto")
    assert isinstance(loaded.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)


@pytest.mark.parametrize("kind", SPECS)
def test_bytes_are_those_of_bitsandbytes_itself(kit, kind):
    """Its own quantizer, given our values. A magnitude below half of FP4's smallest has either zero's code."""
    module = kit.plain(SPECS[kind])
    export_module(module, "bitsandbytes", kit.out)
    stored = load_file(kit.out / "model.safetensors")
    layer = module.net[0]
    packed, state = quantize_4bit(layer.quantizer("weight")(layer.weight).detach(), blocksize=32, quant_type=kind)
    assert torch.equal(stored["net.0.weight.absmax"], state.absmax)
    assert torch.equal(stored["net.0.weight.quant_map"], state.code)
    assert torch.equal(stored["net.0.weight"], packed)


@pytest.mark.parametrize("rules", [{"*": "nf4-g32", "head": None}, {"*": SPECS["fp4"], "net.0": "nf4"}])
def test_a_module_of_one_s_own(kit, rules):
    if rules.get("net.0") == "nf4":
        rules = {**rules, "net.0": "nf4-channel"}
    module = kit.plain(rules)
    proof = export_module(module, "bitsandbytes", kit.out)
    assert proof.passed
    plain = load(kit.out, kit.Plain()).eval()
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), module(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("int4-g32", "its formats are NF4 and FP4"),
        ("nf4-g16", r"its blocks are of 32, .* not as PerGroup\(16\) has them"),
        ({"*": {"weight": "nf4-g32", "input": "int8-token"}}, "Linear4bit computes with float activations"),
    ],
)
def test_what_it_has_no_place_for(kit, rules, message):
    with pytest.raises(ValueError, match=message):
        export_module(kit.plain(rules), "bitsandbytes", kit.out)


def test_skipped_layers_and_a_quantized_head(kit):
    module = kit.llama({"*": "nf4-g32", "lm_head": "nf4-g64", "mlp.up_proj": None})
    assert export_module(module, "bitsandbytes", kit.out).passed
    loaded = AutoModelForCausalLM.from_pretrained(kit.out)
    assert isinstance(loaded.lm_head, bitsandbytes.nn.Linear4bit)
    assert type(loaded.model.layers[0].mlp.up_proj) is torch.nn.Linear
