"""Bytes of deployed models, counted by hand."""

import pytest
import torch
from torch import nn

from qlightning import convert
from qlightning.evaluation.size import deployed_bytes, float_bytes

O, I = 48, 64  # noqa: E741  (a linear layer's output and input features)


def layer(dtype=torch.float32, *, bias=True):
    return nn.Sequential(nn.Linear(I, O, bias=bias, dtype=dtype))


@pytest.mark.parametrize(
    ("spec", "dtype", "wanted"),
    [
        ("int8", torch.float32, O * I + 4 * O),
        ("int8", torch.bfloat16, O * I + 2 * O),
        ("int4-g32", torch.bfloat16, O * I // 2 + 2 * O * (I // 32)),
        ("int4-g32-sfp32", torch.bfloat16, O * I // 2 + 4 * O * (I // 32)),
        ("int3-tensor", torch.float32, O * I * 3 // 8 + 4),
        ("int4-asym-g32", torch.float16, O * I // 2 + 2 * O * 2 + O * 2 // 2),  # half a byte for each zero point
        ("int4-lsq", torch.float32, O * I // 2 + 4 * O),
        ("nvfp4", torch.bfloat16, O * I // 2 + O * (I // 16)),  # E4M3 scales
        ("mxfp4", torch.bfloat16, O * I // 2 + O * (I // 32)),  # E8M0 scales
        ("nf4-g64", torch.bfloat16, O * I // 2 + 2 * O),
        ("binary", torch.float32, O * I // 8 + 4 * O),
        ("ternary", torch.float32, O * I // 4 + 4),
        ("fp8e4m3", torch.float32, O * I + 4 * O),
        ("int4-b16x16", torch.float32, O * I // 2 + 4 * 3 * 4),
    ],
)
def test_one_layer(spec, dtype, wanted):
    model = layer(dtype)
    width = dtype.itemsize
    assert float_bytes(model) == width * (O * I + O)
    convert(model, spec)
    assert float_bytes(model) == width * (O * I + O)
    assert deployed_bytes(model) == wanted + width * O


def test_codes_are_packed_over_the_whole_matrix():
    model = nn.Sequential(nn.Linear(5, 3, bias=False))
    convert(model, "int3")
    assert deployed_bytes(model) == 6 + 3 * 4  # 15 codes of 3 bits: 45 bits


def test_what_stays_in_float_counts_as_it_is():
    model = nn.Sequential(nn.Linear(I, O), nn.LayerNorm(O), nn.Linear(O, 2))
    convert(model, {"0": "int8"}, min_coverage=0.5)
    assert deployed_bytes(model) == (O * I + 4 * O) + 4 * O + 4 * 2 * O + 4 * (2 * O + 2)


def test_input_quantizers_cost_nothing_in_size():
    model, plain = layer(), layer()
    convert(model, {"*": {"weight": "int8", "input": "int8-token"}})
    convert(plain, "int8")
    assert deployed_bytes(model) == deployed_bytes(plain)


def test_convolutions_and_embeddings():
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    convert(model, "int4")
    assert deployed_bytes(model) == 6 * 36 // 2 + 4 * 6 + 4 * 6
    table = nn.ModuleDict({"table": nn.Embedding(10, 8)})
    convert(table, {"type:Embedding": "int4"})
    assert deployed_bytes(table) == 10 * 8 // 2 + 4 * 10


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.body = nn.Linear(8, 8, bias=False)
        self.head.weight = self.embedding.weight


def test_a_shared_weight_counts_once():
    assert float_bytes(Tied()) == 4 * (80 + 64)
    model = Tied()
    convert(model, "int8")
    assert deployed_bytes(model) == 4 * 80 + 64 + 4 * 8
    model = Tied()
    convert(model, {"*": "int8", "type:Embedding": "int8"}, tied="share")
    assert deployed_bytes(model) == 80 + 4 * 10 + 64 + 4 * 8


def test_an_unconverted_model_is_as_large_as_it_is():
    model = layer()
    assert deployed_bytes(model) == float_bytes(model) == 4 * (O * I + O)
