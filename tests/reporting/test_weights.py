"""The facts of weights and inputs, against numpy and counting by hand."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from qlightning import Scheme, convert
from qlightning.methods.fairy2i import PhaseSum
from qlightning.numerics.shifted import Shifted
from qlightning.reporting.weights import input_facts, weight_facts


def facts_of(module):
    return {facts.name: facts for facts in weight_facts(module)}


@pytest.mark.parametrize(
    ("rules", "bits"),
    [
        ("int4-g32", 4 + 32 / 32),
        ("ternary", 2 + 32 / 2048),
        ("nvfp4", 4 + 8 / 16),
        ("mxfp4", 4 + 8 / 32),
        ("int8-asym", 8 + (32 + 8) / 32),
        ("int4-lsq", 4 + 32 / 32),
        (PhaseSum(stages=2), 2 + 2 * 4 * 32 / 2048),
    ],
)
def test_bits_and_sqnr(kit, rules, bits):
    module = kit.net({"net.*": rules})
    facts = facts_of(module)["net.0.weight"]
    layer = module.net[0]
    w, q = layer.weight.detach().double().numpy(), layer.weight_quantizer(layer.weight).detach().double().numpy()
    assert facts.sqnr == pytest.approx(10 * np.log10((w**2).sum() / ((w - q) ** 2).sum()), abs=1e-6)
    assert facts.bits == pytest.approx(bits, abs=0.01)
    assert (facts.shape, facts.kind, facts.acts) == ((64, 32), "Linear", "acts")
    assert facts.size.trained == 4 * 2048


@pytest.mark.parametrize("spec", ["int4-g32", "int8", "nvfp4", "ternary"])
def test_step_sizes_are_those_that_are_stored(kit, spec):
    module = kit.net(spec)
    facts = facts_of(module)["net.0.weight"]
    stored = module.net[0].weight_quantizer.quantize(module.net[0].weight)
    steps = stored.scale.float() / (1.0 if stored.tensor_scale is None else stored.tensor_scale)
    assert facts.steps == pytest.approx(sorted(steps.flatten().tolist()))
    assert facts.all_steps == steps.numel()


def test_embeddings_and_convolutions():
    module = nn.ModuleDict({"table": nn.Embedding(10, 32), "conv": nn.Conv2d(4, 6, 3)})
    convert(module, {"*": "int4", "type:Embedding": "int8"}, min_coverage=0.0)
    facts = facts_of(module.eval())
    assert facts["table.weight"].shape == (10, 32)
    assert facts["conv.weight"].shape == (6, 36)
    assert facts["conv.weight"].histogram.elements == 216
    assert facts["table.weight"].sqnr > facts["conv.weight"].sqnr > 5


def test_an_adapter_inside_is_part_of_the_weight():
    model = get_peft_model(nn.Sequential(nn.Linear(32, 32)), LoraConfig(target_modules=["0"], r=2))
    convert(model, Scheme("int4-g32", adapter="peft"), min_coverage=0.0)
    lora = model.base_model.model[0]
    with torch.no_grad():
        lora.lora_B["default"].weight.normal_()
    (facts,) = weight_facts(model.eval())
    w = (lora.weight + lora.get_delta_weight("default")).detach()
    q = lora.base_layer.weight_quantizer(w)
    assert facts.name == "base_model.model.0.weight"
    assert facts.sqnr == pytest.approx(float(10 * torch.log10(w.square().sum() / (w - q).square().sum())), abs=1e-3)


def test_what_does_not_act_yet_or_any_more(kit):
    module = kit.net("int4-lsq")
    module.net[0].weight_quantizer.enabled = False
    module.net[0].weight_quantizer.scale.ready = False
    module.net[2].weight_quantizer.release()
    facts = facts_of(module)
    first, second, third = (facts[name] for name in ("net.0.weight", "net.2.weight", "head.weight"))
    assert (first.acts, first.sqnr, first.histogram, first.steps) == ("not yet", None, None, [])
    assert (second.acts, third.acts) == ("released", "acts")
    assert second.size.served == second.size.trained == 4 * 2048


def test_inputs(kit):
    inputs = {"net.0": "int8-token", "net.2": "int8-tensor-lsq", "head": Shifted("int4-tensor-lsq")}
    module = kit.net({name: {"weight": "int8", "input": spec} for name, spec in inputs.items()})
    for name in ("net.2", "head"):
        quantizer = module.get_submodule(name).input_quantizer
        quantizer.initialize(torch.randn(4, module.get_submodule(name).in_features))
    dynamic, learned, shifted = input_facts(module)
    assert (dynamic.name, dynamic.spec, dynamic.steps) == ("net.0.input", "int8-token", [])
    assert learned.steps == pytest.approx([float(module.net[2].input_quantizer.scale.value.detach())])
    assert shifted.steps == pytest.approx([float(module.head.input_quantizer.scale.value.detach())])
    assert shifted.spec.startswith("Shifted(")
