"""Embeddings: a lookup in the quantized table, whatever way it is computed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlightning.layers.convert import convert

SPECS = [
    "int8",
    "int4-g8",
    "int4-tensor",
    "int4-b4x8",
    "int4-lsq",
    "nf4-g8",
    "int8-asym",
    "nvfp4",
    "ternary",
    "int3-clip",
]


def converted(table, scheme):
    model = nn.Sequential(copy.deepcopy(table))
    convert(model, {"type:Embedding": scheme})
    return model[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("spec", SPECS)
def test_it_looks_up_in_the_quantized_table(spec, padding_idx, dtype):
    plain = nn.Embedding(12, 16, padding_idx=padding_idx, dtype=dtype)
    layer = converted(plain, spec)
    quantizer = copy.deepcopy(layer.quantizer("weight"))
    ids = torch.randint(12, (3, 5))
    ids[0, :2] = 3
    ours, theirs = layer(ids), F.embedding(ids, quantizer(plain.weight), padding_idx)
    assert torch.equal(ours, theirs)
    grad = torch.randn(ours.shape).to(dtype)
    ours.backward(grad)
    theirs.backward(grad)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    for mine, other in zip(layer.quantizer("weight").parameters(), quantizer.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    if padding_idx is not None:
        assert not layer.weight.grad[padding_idx].any()


@pytest.mark.parametrize("spec", ["int8", "int4-lsq"])
def test_scale_grad_by_freq_is_obeyed(spec):
    plain = nn.Embedding(6, 8, scale_grad_by_freq=True)
    layer = converted(plain, spec)
    ids = torch.tensor([1, 1, 1, 2])
    plain(ids).sum().backward()
    layer(ids).sum().backward()
    assert torch.equal(layer.weight.grad[1:3], plain.weight.grad[1:3])
    assert layer.weight.grad[1, 0] == 1


def test_bypassed_it_is_the_plain_layer():
    plain = nn.Embedding(6, 8)
    layer = converted(plain, {"weight": "int4-lsq", "output": "int8-token"})
    for _, quantizer in layer.quantizers():
        quantizer.enabled = False
    ids = torch.tensor([[1, 5]])
    assert torch.equal(layer(ids), plain(ids))
    layer(input=ids).sum().backward()
    assert not layer.quantizer("weight").scale.value.grad.any()


def test_output_quantizer():
    plain = nn.Embedding(6, 8)
    layer = converted(plain, {"output": "int4-token"})
    ids = torch.tensor([1, 5])
    assert torch.equal(layer(ids), layer.quantizer("output")(plain(ids)))


def test_no_ids_and_a_scalar_id():
    layer = converted(nn.Embedding(6, 8), "int4-lsq")
    assert layer(torch.zeros(0, dtype=torch.long)).shape == (0, 8)
    assert layer(torch.tensor(2)).shape == (8,)


def test_only_a_rule_that_names_it_converts_it():
    model = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 8))
    coverage = convert(model, "int4-g8")
    assert type(model[0]) is nn.Embedding
    assert "type:Embedding" in coverage.rows[0].reason


@pytest.mark.parametrize(("arguments", "reason"), [({"sparse": True}, "sparse"), ({"max_norm": 1.0}, "max_norm")])
def test_tables_that_cannot_be_quantized_say_why(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        convert(nn.Sequential(nn.Embedding(6, 8, **arguments)), {"0": "int8"})


def test_an_input_quantizer_cannot_act_on_ids():
    with pytest.raises(ValueError, match="input"):
        convert(nn.Sequential(nn.Embedding(6, 8)), {"0": {"weight": "int8", "input": "int8-token"}})
