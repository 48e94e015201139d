"""The proof finds the smallest difference, names the layer, and cannot be passed by what is not a number."""

import copy
import json
import math

import numpy
import pytest
import torch
from torch import nn

from qlightning.export.inputs import Call, Inputs
from qlightning.export.plain import Plain
from qlightning.export.target import EXACT, Tolerance, make_plan
from qlightning.export.trained import Trained
from qlightning.export.verify import compare, ulps
from qlightning.layers.convert import convert, restore

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
INPUTS = Inputs([Call((X[:4],), {}), Call((X[4:],), {})], "two batches")


@pytest.fixture
def plan():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    convert(module, "int4-g8")
    return make_plan(Plain(), Trained(module))


@pytest.fixture
def runtime(plan):
    """The restored module with the trained weights."""
    module = restore(copy.deepcopy(plan.trained.model))
    values = {weight.name: weight.values() for weight in plan.trained.weights}
    module.load_state_dict({**module.state_dict(), **values})
    return module


def test_equal_models_pass(plan, runtime):
    proof = compare(plan, runtime, INPUTS, EXACT)
    assert proof.passed
    assert [(d.name, d.ulp, d.largest, d.sqnr) for d in (*proof.layers, proof.outputs)] == [
        (name, 0, 0.0, math.inf) for name in ("0", "2", "outputs")
    ]
    text = proof.text()
    assert "train = deploy, on two batches" in text
    assert "2 of 2 equal bit for bit" in text
    assert text.endswith("passed")
    assert json.loads(json.dumps(proof.plain(), allow_nan=False))["outputs"]["sqnr_db"] is None


def test_one_scale_off_by_one_ulp_fails(plan, runtime):
    """The mutation that verify is there for: the artifact was written with one scale rounded otherwise."""
    weight = next(plan.trained.weights)
    stored = weight.quantize()
    stored.scale.view(-1)[3] = torch.nextafter(stored.scale.view(-1)[3], torch.tensor(2.0))
    runtime[0].weight.data = weight.quantizer.dequantize(stored, torch.float32)
    proof = compare(plan, runtime, INPUTS, EXACT)
    assert not proof.passed
    assert proof.layers[0].ulp > 0
    assert 120 < proof.layers[0].sqnr < 180
    assert "FAILED at" in proof.text()
    assert "1 of 2 equal" in proof.text()
    assert proof.layers[1].largest == 0  # given the trained model's inputs
    assert compare(plan, runtime, INPUTS, Tolerance(None, 80.0)).passed
    assert not compare(plan, runtime, INPUTS, Tolerance(None, 180.0)).passed
    assert not compare(plan, runtime, INPUTS, Tolerance(None, 80.0, 180.0)).passed


def test_a_layer_that_differs_without_effect_on_the_outputs_fails(plan, runtime):
    for module in (plan.trained.model, runtime):
        module[2].weight.data.zero_()
    runtime[0].bias.data += 1e-3
    proof = compare(plan, runtime, INPUTS, EXACT)
    assert proof.outputs.largest == 0
    assert not proof.passed
    assert [failure.name for failure in proof.failures] == ["0"]


def test_not_a_number_fails_every_tolerance(plan, runtime):
    runtime[2].bias.data[1] = float("nan")
    assert not compare(plan, runtime, INPUTS, Tolerance(None, -1000.0)).passed
    assert not compare(plan, runtime, INPUTS, Tolerance(2**31, None)).passed


def test_a_runtime_that_is_no_module_is_compared_at_its_outputs(plan, runtime):
    proof = compare(plan, lambda x: {"logits": runtime(x), "loss": None}, INPUTS, EXACT)
    assert proof.passed
    assert proof.layers == []
    assert "not visible" in proof.text()
    runtime[0].weight.data[0, 0] += 1
    assert not compare(plan, lambda x: runtime(x), INPUTS, EXACT).passed


def test_other_outputs_are_no_match(plan, runtime):
    with pytest.raises(ValueError, match="has 2 outputs, the trained model 1"):
        compare(plan, lambda x: (runtime(x), x), INPUTS, EXACT)
    with pytest.raises(ValueError, match=r"shape \(4, 3\), the trained model's \(4, 4\)"):
        compare(plan, lambda x: runtime(x)[:, :3], INPUTS, EXACT)


def test_what_was_dropped_is_switched_off_and_its_cost_told():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)).eval()
    convert(module, {"*": {"weight": "int4-g8", "input": "int3-token"}})
    plan = make_plan(Plain(), Trained(module), drop=["input"])
    runtime = restore(copy.deepcopy(module))
    runtime.load_state_dict({**runtime.state_dict(), **{w.name: w.values() for w in plan.trained.weights}})
    proof = compare(plan, runtime, INPUTS, EXACT)
    assert proof.passed
    assert proof.without == ["input"]
    assert proof.cost is not None
    assert 5 < proof.cost < 30
    assert "without what was dropped: input (that alone: 1" in proof.text()
    assert module[0].quantizer("input").enabled


@pytest.mark.parametrize("kind", [numpy.float32, numpy.float16, numpy.float64])
@pytest.mark.parametrize("largest", [1.0, -3.7, 1e-3, 65000.0, 2.0**-14])
def test_ulps_are_spacings_at_the_largest_value(kind, largest):
    """Against numpy's spacing."""
    values = numpy.array([largest, 0.0], dtype=kind)
    unit = abs(numpy.spacing(values[0]))
    moved = values + numpy.array([3 * unit, -5 * unit], dtype=kind)
    assert ulps(torch.from_numpy(values), torch.from_numpy(moved)) == 5


def test_less_than_one_ulp_counts_as_one():
    x = torch.tensor([3.0, 0.0])
    assert ulps(x, x + torch.tensor([0.0, 1e-30])) == 1


def test_ulps_of_two_dtypes_are_the_coarser_one_s():
    x = torch.tensor([1.0, 1.5])
    assert ulps(x, x.bfloat16()) == 0
    assert ulps(x, (x + 2**-7).bfloat16()) == 1
    assert ulps(torch.tensor([0.0]), torch.tensor([-0.0])) == 0
    assert ulps(torch.tensor([]), torch.tensor([])) == 0
    assert ulps(torch.tensor([0.0]), torch.tensor([1.0])) > 2**23
