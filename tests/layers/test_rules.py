"""Rules: who decides for a layer, and errors that print the corrected call for rules that cannot act."""

import re

import pytest
import torch
from torch import nn

from qlightning.layers.convert import convert, convert_present
from qlightning.layers.rules import Rules
from qlightning.layers.scheme import Scheme
from qlightning.numerics import parse


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(32, 32)
        self.down_proj = nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 32)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.conv = nn.Conv2d(4, 8, 3)
        self.lm_head = nn.Linear(32, 10)


def quantized(rules, **arguments):
    """Weight spec by layer name of what conversion quantized."""
    coverage = convert(Model(), rules, min_coverage=0.0, **arguments)
    return {row.name: row.quantizers["weight"] for row in coverage.converted}


PROJECTIONS = [f"layers.{i}.{name}" for i in range(3) for name in ("q_proj", "down_proj")]


def test_one_spec_is_the_rule_for_everything_but_output_heads_and_embeddings():
    assert quantized("int4-g4") == dict.fromkeys([*PROJECTIONS, "conv"], "int4-g4")


def test_the_last_rule_that_matches_decides():
    one = quantized({"*": "int4", "layers.*": "int8", "*.q_proj": "int3", "layers.1.*": "int2"})
    assert one["conv"] == "int4"
    assert (one["layers.0.down_proj"], one["layers.0.q_proj"]) == ("int8", "int3")
    assert (one["layers.1.down_proj"], one["layers.1.q_proj"]) == ("int2", "int2")
    other = quantized({"*": "int4", "layers.1.*": "int2", "*.q_proj": "int3"})
    assert other["layers.1.q_proj"] == "int3"


def test_the_rule_for_everything_gives_way_wherever_it_stands():
    rules = {"conv": "int8", "layers.0.*": None, "*": "int4"}
    found = quantized(rules)
    assert found["conv"] == "int8"
    assert "layers.0.q_proj" not in found
    assert found["layers.1.q_proj"] == "int4"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("down_proj", PROJECTIONS[1::2]),
        ("1.q_proj", ["layers.1.q_proj"]),
        ("layers.2.down_proj", ["layers.2.down_proj"]),
        ("layers.[02].q_proj", ["layers.0.q_proj", "layers.2.q_proj"]),
        ("*_proj", PROJECTIONS),
        ("?_proj", PROJECTIONS[::2]),
        ("type:Conv2d", ["conv"]),
        ("type:Conv*", ["conv"]),
        ("type:Linear", [*PROJECTIONS, "lm_head"]),
        ("type:Embedding", ["embed"]),
        ("embed", ["embed"]),
        ("lm_head", ["lm_head"]),
    ],
)
def test_patterns(pattern, names):
    assert list(quantized({pattern: "int4"})) == names


def test_a_tail_is_whole_names():
    with pytest.raises(ValueError, match="'proj' matches no layer"):
        convert(Model(), {"*": "int4", "proj": "int8"})


@pytest.mark.parametrize(
    "value", ["int8", Scheme("int8", input="int8-token"), {"weight": "int8", "input": "int8-token"}]
)
def test_what_a_rule_may_say(value):
    model = Model()
    convert(model, {"*": "int4", "conv": value})
    expected = ["weight"] if value == "int8" else ["weight", "input"]
    assert [name for name, _ in model.conv.quantizers()] == expected


def test_output_heads_stay_in_float_by_default_and_may_be_named():
    coverage = convert(Model(), "int4")
    (head,) = [row for row in coverage.rows if row.name == "lm_head"]
    assert head.reason == "output head, in float by default"
    assert quantized({"*": "int4", "lm_head": "int8"})["lm_head"] == "int8"


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("layers.0.q_porj", "layers.0.q_proj"),
        ("head", "lm_head"),
        ("type:Conv2D", "type:Conv2d"),
        ("model.layers.1.down_proj", "layers.1.down_proj"),
    ],
)
def test_a_rule_that_matches_nothing_names_layers_like_it(pattern, near):
    model = Model()
    with pytest.raises(ValueError, match="matches no layer") as error:
        convert(model, {"*": "int4", pattern: "int8"})
    assert repr(pattern) in str(error.value)
    suggested = str(error.value).split("for example ")[1].split(", ")
    assert near in suggested
    assert quantized({"*": "int4", near: "int8"})


def test_a_rule_that_later_rules_hide_is_an_error():
    with pytest.raises(ValueError, match=r"'layers\.0\.\*' decides nothing: later rules.*layers\.0\.q_proj"):
        convert(Model(), {"*": "int4", "layers.0.*": "int8", "*_proj": "int2", "layers.0.norm": None})
    assert quantized({"*": "int4", "*_proj": "int2", "layers.0.*": "int8"})["layers.0.q_proj"] == "int8"


def test_a_rule_for_layers_that_cannot_be_quantized_is_an_error_that_says_why():
    with pytest.raises(ValueError, match=r"matches only layers that cannot be converted \(layers\.0\.norm: no matrix"):
        convert(Model(), {"*": "int4", "norm": "int8"})
    with pytest.raises(ValueError, match=r"cannot be converted .*no quantized twin of Conv3d.*\{'1': None\}"):
        convert(nn.Sequential(nn.Linear(32, 32), nn.Conv3d(4, 4, 3)), {"*": "int4", "1": "int8"})


def test_float_may_be_chosen_for_layers_that_cannot_be_quantized():
    """What the low-coverage error advises."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv3d(8, 8, 3))
    with pytest.raises(ValueError, match="leave it in float with rules"):
        convert(model, "int4")
    coverage = convert(model, {"*": "int4", "1": None})
    assert coverage.rows[1].reason == "rule '1'"
    assert coverage.reachable_share == 1.0


def test_no_rules_and_rules_that_are_none():
    with pytest.raises(ValueError, match="convert\\(module, 'int4-g128'\\)"):
        Rules({})
    with pytest.raises(ValueError, match="nothing was converted"):
        convert(Model(), {"*": None})


def test_a_scheme_in_the_place_of_rules_is_corrected():
    with pytest.raises(ValueError, match=r"write \{'\*': \{'weight': 'int4', 'input': 'int8-token'\}\}"):
        convert(Model(), {"weight": "int4", "input": "int8-token"})


def test_rules_may_be_used_again():
    rules = Rules({"*": "int4", "conv": "int8"})
    for _ in range(2):
        assert len(convert(Model(), rules).converted) == 7
    assert Rules(rules).given == rules.given


def test_two_models_do_not_share_quantizers():
    scheme = Scheme("int4-lsq")
    one, other = Model(), Model()
    convert(one, scheme)
    convert(other, scheme)
    with torch.no_grad():
        one.conv.quantizer("weight").scale.value.fill_(7)
    assert not (other.conv.quantizer("weight").scale.value == 7).any()
    assert not list(scheme.weight.parameters())


def test_a_placement_no_layer_has_is_an_error():
    with pytest.raises(ValueError, match="kv_cache"):
        convert(Model(), {"*": {"weight": "int4", "kv_cache": "int8-token"}})


def test_a_wrong_spec_in_a_rule_is_corrected():
    with pytest.raises(ValueError, match=r"rule 'conv': weight='int4-g32x'.*did you mean") as error:
        convert(Model(), {"*": "int4", "conv": "int4-g32x"})
    assert parse(re.search(r"did you mean '([^']+)'", str(error.value))[1])


def test_rules_name_the_first_and_last_blocks_of_any_model():
    found = quantized({"*": "int4", "last:1": None, "first:1": "int8"})
    assert {name: found.get(name) for name in PROJECTIONS} == {
        **dict.fromkeys(PROJECTIONS[:2], "int8"),
        **dict.fromkeys(PROJECTIONS[2:4], "int4"),
        **dict.fromkeys(PROJECTIONS[4:]),
    }
    assert found["conv"] == "int4"


@pytest.mark.parametrize(("pattern", "blocks"), [("last:0.15", 1), ("last:0.5", 2), ("first:0.7", 2), ("last:1.0", 3)])
def test_a_share_is_rounded_to_whole_blocks_and_to_one_at_least(pattern, blocks):
    found = quantized({"*": "int4", pattern: None})
    assert len(found) == 1 + 2 * (3 - blocks)


def test_blocks_are_numbered_siblings_in_the_models_order():
    names = ["stem", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.down.0", "fc"]
    rules = Rules({"*": "int4", "last:2": None}).know(names)
    assert [name for name in names if rules.decide(name, "Conv2d")[0] == "last:2"] == names[3:6]
    rules = Rules({"*": "int4", "first:1": None}).know(["0", "2", "20"])
    assert [name for name in ("0", "2", "20") if rules.decide(name, "Linear")[0] == "first:1"] == ["0"]


@pytest.mark.parametrize("pattern", ["last:0", "last:1.5", "first:x", "last:", "first:-1"])
def test_positions_that_are_none_are_refused(pattern):
    with pytest.raises(ValueError, match="write a number of blocks"):
        Rules({"*": "int4", pattern: None})


def test_a_model_without_numbered_blocks_has_no_last_one():
    with pytest.raises(ValueError, match=r"rule 'last:1': no layer of the model is in a numbered block"):
        convert(Block(), {"*": "int4", "last:1": None})


def test_a_module_that_is_not_complete_waits_for_its_last_blocks():
    model = Model()
    assert not convert_present(model, Rules({"*": "int4", "last:1": None})).rows
    assert convert_present(model, Rules({"*": "int4"})).converted
