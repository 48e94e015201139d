"""Targets are found by the folder, and refuse what they would lose until that is accepted."""

import pytest
import torch
from torch import nn

from qlightning.export.plain import Plain
from qlightning.export.target import Target, make_plan, target_named, targets
from qlightning.export.trained import Trained
from qlightning.layers.convert import convert


class Picky(Plain):  # a subclass of a subclass is no target of its own
    """Has no place for the codes of the layer called 1, nor for any output."""

    def misfit(self, weight, dtype):
        return "it is the wrong one" if weight.name == "1.weight" else None

    def misplaced(self, layer, placement, dtype):
        return "no outputs" if placement == "output" else None


@pytest.fixture
def trained():
    module = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)).eval()
    convert(module, {"*": {"weight": "int4-g8", "input": "int8-token", "output": "int8-token"}})
    return Trained(module)


def test_found_by_the_folder():
    known = targets()
    assert {"plain", "compressed-tensors"} <= set(known)
    assert Picky not in known.values()
    assert target_named("plain") is Plain
    with pytest.raises(ValueError, match="'compresed-tensors' is not known; did you mean 'compressed-tensors'"):
        target_named("compresed-tensors")


def test_a_target_from_elsewhere_is_found():
    class Mine(Target):
        name = "mine"
        misfit = misplaced = write = load = None

    assert target_named("mine") is Mine


def test_what_would_be_lost_is_said_with_the_way_to_accept_it(trained):
    with pytest.raises(ValueError, match="would lose") as error:
        make_plan(Picky(), trained)
    assert str(error.value) == (
        "plain has no place for everything this model was trained with, and would lose\n"
        "  output of 2 layers: no outputs (0)\n"
        "  codes of 1 layer: the weights stay on their grid, but in float: it is the wrong one (1.weight)\n"
        "write drop=['output', 'codes'] (--drop output --drop codes) to accept that, or choose another format"
    )
    with pytest.raises(ValueError, match=r"drop=\['output', 'codes'\]"):
        make_plan(Picky(), trained, drop=["output"])


def test_the_plan(trained):
    plan = make_plan(Picky(), trained, drop=["codes", "output"])
    assert plan.dropped == {"output": ["0", "1"], "codes": ["1.weight"]}
    assert plan.dtype == torch.float32
    assert [weight.name for weight in plan.packed()] == ["0.weight"]
    dense = dict(plan.dense())
    assert dense.keys() == {"1.weight", "0.bias", "1.bias"}
    assert torch.equal(dense["1.weight"], trained.layers[1].weights[0].values())


def test_dense_tensors_are_in_the_artifact_s_dtype(trained):
    plan = make_plan(Plain(), trained, drop=["input", "output"], dtype=torch.bfloat16)
    assert plan.dtype == torch.bfloat16
    assert {tensor.dtype for _, tensor in plan.dense()} == {torch.bfloat16}


def test_a_target_without_a_place_for_any_codes():
    module = nn.Sequential(nn.Linear(16, 8)).eval()
    convert(module, "nf4-g8")
    with pytest.raises(ValueError, match=r"torchao has no place for any codes of this model .* write format='plain'"):
        make_plan(target_named("torchao")(), Trained(module), drop=["codes"])


@pytest.mark.parametrize("word", ["kv_cache", "nonsense"])
def test_what_is_not_lost_cannot_be_dropped(trained, word):
    with pytest.raises(ValueError, match=f"drop='{word}': plain loses no such thing here; .* is output, codes"):
        make_plan(Picky(), trained, drop=["codes", "output", word])


def test_a_whole_model_can_be_refused(trained):
    target = target_named("compressed-tensors")()
    with pytest.raises(ValueError, match="compressed-tensors: Sequential is no model of transformers"):
        make_plan(target, trained)
