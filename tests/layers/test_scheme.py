"""Schemes: what a rule may say about one layer, and what it is told when it says something else."""

import re

import pytest
import torch

from qlightning.layers.scheme import Scheme, as_scheme
from qlightning.numerics import Int, PerChannel, PerGroup, Quantizer, parse

PLACEMENTS = ["weight", "input", "output", "kv_cache", "attention"]


def test_specs_and_parts_are_interchangeable():
    parts = Quantizer(Int(4), PerGroup(32))
    assert Scheme("int4-g32") == Scheme(weight=parts) == as_scheme("int4-g32") == as_scheme({"weight": parts})
    assert Scheme("int4-g32") != Scheme("int4-g64")
    assert as_scheme(None) is None


def test_only_what_is_quantized_is_listed():
    scheme = Scheme("int4", input="int8-token", kv_cache="int8-token")
    assert [placement for placement, _ in scheme.items()] == ["weight", "input", "kv_cache"]
    assert repr(scheme).startswith("Scheme(")
    assert eval(repr(scheme), {"Scheme": Scheme, **vars(__import__("qlightning.numerics").numerics)}) == scheme


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_wrong_spec_names_its_placement_and_a_spec_that_parses(placement):
    with pytest.raises(ValueError, match=f"{placement}='int44-tokn'.*did you mean") as error:
        Scheme(**{placement: "int44-tokn"})
    suggested = re.search(r"did you mean '([^']+)'", str(error.value))[1]
    assert isinstance(parse(suggested), Quantizer)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("value", [4, ["int4"], torch.int8, True])
def test_what_is_no_spec_is_told_what_one_is(placement, value):
    with pytest.raises(ValueError, match=rf"{placement}=.*for example {placement}='") as error:
        Scheme(**{placement: value})
    assert parse(re.search(r"for example \w+='([^']+)'", str(error.value))[1])


def test_granularities_that_a_placement_cannot_have():
    with pytest.raises(ValueError, match="a weight has no tokens"):
        Scheme(weight="int8-token")
    for placement in PLACEMENTS[1:]:
        with pytest.raises(ValueError, match=f"{placement}='int8'.*no fixed rows.*{placement}='int8-token'"):
            Scheme(**{placement: "int8"})
        with pytest.raises(ValueError, match="no fixed rows"):
            Scheme(**{placement: Quantizer(Int(8), PerChannel())})
        assert Scheme(**{placement: "int8-token"})


@pytest.mark.parametrize("value", [{"wieght": "int4"}, {"weight": "int4", "bits": 4}])
def test_a_mapping_with_unknown_placements_is_corrected(value):
    with pytest.raises(ValueError, match=r"is no scheme; write for example \{'weight': 'int4-g128'"):
        as_scheme(value)
