"""Names of modules around a weight, and what modules in a block get and return."""

import torch
from torch import nn

from qlightning.capture import sites_of
from qlightning.layers.convert import convert
from qlightning.solvers.units import enclosing, seen_by, surrounding, unit_of


def test_names(small) -> None:
    task = small.first_layer(small.llama())
    qkv, o, _, down = task.groups
    assert unit_of(task.block, o[0]) == enclosing(task.block, o) == "self_attn.o_proj"
    assert enclosing(task.block, qkv) == "self_attn"
    assert enclosing(task.block, [*qkv, *down]) == ""
    assert surrounding(task.block, down[0]) == "mlp"
    listed = nn.ModuleDict({"inner": nn.ModuleList([nn.Linear(4, 4)])})
    convert(listed, "int4")
    assert surrounding(listed, sites_of(listed)[0]) == ""


def test_what_a_module_sees(small) -> None:
    task = small.first_layer(small.llama())
    calls, down = [*task.inputs["fp"], *task.inputs["fp"]], task.block.mlp.down_proj
    first, second = seen_by(task.block, "mlp.down_proj", calls)
    assert torch.equal(down(first[0][0][0]), first[1])
    assert second[0][0][0] is first[0][0][0]  # what is the same is kept once
    assert not first[1].requires_grad
    assert not down._forward_hooks
    ((call, output),) = seen_by(task.block, "", task.inputs["fp"])
    assert torch.equal(output, task.run(call))
