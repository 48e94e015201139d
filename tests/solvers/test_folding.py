"""What a scale folds into, found without names, in models whose answer is known."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlightning.layers.convert import convert
from qlightning.solvers.folding import answers_boundedly, find_producer, scale_columns
from qlightning.solvers.solver import BlockTask


def producers(task: BlockTask) -> dict[str, str | None]:
    found = {}
    for group in task.groups:
        producer = find_producer(task, group, generator=torch.Generator().manual_seed(0))
        found.update(dict.fromkeys((site.name for site in group), producer and producer.name))
    return found


def states(block):
    return {name: tensor.clone() for name, tensor in block.state_dict().items() if "extra_state" not in name}


def test_a_llama_layer(small) -> None:
    task = small.first_layer(small.llama())
    before = states(task.block)
    assert producers(task) == {
        **{f"self_attn.{name}": "input_layernorm" for name in ("q_proj", "k_proj", "v_proj")},
        "self_attn.o_proj": "self_attn.v_proj",
        **{f"mlp.{name}": "post_attention_layernorm" for name in ("gate_proj", "up_proj")},
        "mlp.down_proj": "mlp.up_proj",
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in states(task.block).items())


def test_values_that_several_heads_share_take_no_scale(small) -> None:
    found = producers(small.first_layer(small.llama(num_key_value_heads=1)))
    assert found["self_attn.o_proj"] is None
    assert found["mlp.down_proj"] == "mlp.up_proj"


def test_queries_and_keys_are_told_from_the_rest(small) -> None:
    task = small.first_layer(small.llama())
    bounded = {site.name for group in task.groups for site in group if answers_boundedly(task, site)}
    assert bounded == {"self_attn.q_proj", "self_attn.k_proj"}


def test_a_fold_leaves_the_output(small) -> None:
    task = small.first_layer(small.llama())
    (call,) = task.inputs["fp"]
    before = task.run(call)
    for group in task.groups:
        producer = find_producer(task, group, generator=torch.Generator())
        s = torch.rand(group[0].weight.shape[1]) + 0.5
        scale_columns(group, s)
        assert not torch.allclose(task.run(call), before, rtol=1e-3)
        producer.divide(s)
        torch.testing.assert_close(task.run(call), before, rtol=1e-4, atol=1e-5)


class Branches(nn.Module):
    """A norm, two layers, of which the second may be left in float, an activation and a third layer."""

    def __init__(self, act) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(8, 16)
        self.act, self.three = act, nn.Linear(16, 8)

    def forward(self, x):
        h = self.norm(x)
        return x + self.three(self.act(self.one(h)) + self.two(h))


@pytest.mark.parametrize(
    ("act", "rules", "expected"),
    [
        # what enters the third layer is a sum: neither of its terms can be scaled alone
        (F.relu, {"*": "int4"}, {"one": "norm", "two": "norm", "three": None}),
        # a layer in float reads the norm too
        (F.relu, {"*": "int4", "two": None}, {"one": None, "three": None}),
    ],
)
def test_other_readers_and_sums_are_seen(small, act, rules, expected) -> None:
    torch.manual_seed(0)
    block = Branches(act)
    nn.init.normal_(block.norm.bias)
    convert(block, rules, min_coverage=0.0)
    assert producers(small.task(block, torch.randn(4, 8))) == expected


@pytest.mark.parametrize(("act", "expected"), [(nn.ReLU(), "0"), (nn.GELU(), None), (nn.SiLU(), None)])
def test_through_activations(small, act, expected) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 8), act, nn.Linear(8, 4))
    convert(block, "int4")
    assert producers(small.task(block, torch.randn(4, 6))) == {"0": None, "2": expected}


def test_convolutions_and_what_nobody_sees(small) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1))
    convert(block, "int4")
    assert producers(small.task(block, torch.randn(2, 8, 3, 3))) == {"1": "0"}
    dead = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    nn.init.zeros_(dead[3].weight)
    convert(dead, "int4")
    assert producers(small.task(dead, torch.randn(2, 8))) == {"1": None, "3": None}
