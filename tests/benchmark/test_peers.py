"""Other tools: asked for what they have words for, and measured as they are."""

import pytest
import torch
from torch import nn

from qlightning.benchmark.peers import PEERS, Asked, asked


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("int4-g32", Asked(4, 32, None)),
        ("int8-channel,int8-token", Asked(8, None, 8)),
        ("ternary", None),
        ("int4-g32-asym", None),
        ("int4-g32,int8-tensor", None),
        ("int8-channel,int8-token,fprop", None),
    ],
)
def test_what_a_scheme_is_in_their_words(scheme, words) -> None:
    assert asked(scheme) == words


@pytest.mark.parametrize("tool", list(PEERS))
def test_a_scheme_that_a_tool_has_no_words_for_is_absent(tool) -> None:
    peer = PEERS[tool]("ternary")
    assert peer.absent() in (f"{tool} is not installed", f"{tool} has no such scheme")


def test_torchao_fakes_the_same_weights_and_leaves_the_head() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(64, 64, bias=False), "lm_head": nn.Linear(64, 8)})
    weight = model["layer"].weight
    prepared = PEERS["torchao"]("int4-g32").prepare(model)
    assert prepared["layer"].weight is weight
    assert type(prepared["lm_head"]) is nn.Linear
    values = prepared["layer"](torch.eye(64))
    assert all(len(group.unique()) <= 16 for row in values.T for group in row.split(32))
