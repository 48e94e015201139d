"""What all ranks send of their rows, decoded, is the quantized whole, bit for bit."""

import pytest
import torch

from qlightning.numerics.spec import parse
from qlightning.strategies.codes import decode, encode, grid_of_rows, on_rows, packing_of, rows_of, why_not

EXACT = [
    *("int8-channel", "int4-g16", "int4-g16-asym", "int3-channel-asym", "int2-channel-lsq", "int4-g16-lsq"),
    *(
        "int4-g16-asym-lsq",
        "int8-tensor",
        "int8-tensor-asym",
        "int8-tensor-lsq",
        "nf4-g16",
        "fp4e2m1-g16",
        "log4-channel",
    ),
    *(
        "mxfp4",
        "nvfp4",
        "mxfp8e4m3",
        "fp8e4m3-channel",
        "binary-channel-lsq",
        "int6-channel",
        "int5-channel",
        "int4-g16-sfp16",
    ),
]
RANKS = 3


def quantizer_for(spec, weight):
    quantizer = parse(spec)
    quantizer.build(tuple(weight.shape))
    quantizer.initialize(weight)
    return quantizer


def shards(quantizer, weight, unit=1):
    """(rows, matrix, the scale's parameters for them) of every rank, as FSDP2 would cut them."""
    for rank in range(RANKS):
        rows = rows_of(len(weight), rank, RANKS, unit=unit)
        local = {}
        for name, value in quantizer.scale.named_parameters(recurse=False):
            each = -(-len(value) // RANKS)
            whole = quantizer.granularity.shared_rows is None
            local[name] = value.detach() if whole else value.detach()[rank * each : (rank + 1) * each]
        yield rows, weight[rows.start : rows.start + rows.held], local


def gathered(quantizer, weight):
    pieces = list(shards(quantizer, weight))
    ends = torch.stack([torch.stack([-part.min(), part.max()]) for _, part, _ in pieces if len(part)])
    seen = ends.float().nan_to_num(nan=torch.inf).amax(0)
    packing, sent = packing_of(quantizer), []
    for rows, part, local in pieces:
        with on_rows(quantizer, rows, local):
            grid = grid_of_rows(quantizer, part, lambda own: torch.maximum(own, seen))
            sent.append(encode(quantizer, part, rows, packing=packing, grid=grid))
    whole = tuple(torch.cat(tensors) for tensors in zip(*sent, strict=True))
    assert len({tuple(tensor.shape for tensor in tensors) for tensors in sent}) == 1  # all ranks send as much
    return decode(quantizer, whole, tuple(weight.shape), packing=packing, dtype=weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", EXACT)
@pytest.mark.parametrize("count", [9, 10, 4], ids=["even", "short", "empty"])
@torch.no_grad()
def test_bit_for_bit(spec, dtype, count):
    weight = torch.randn(count, 32).mul_(torch.rand(count, 1)).to(dtype)
    quantizer = quantizer_for(spec, weight)
    assert why_not(quantizer, rows_of(count, 0, RANKS)) is None
    values = gathered(quantizer, weight)
    assert values.dtype == dtype
    assert torch.equal(values, quantizer(weight))


@torch.no_grad()
def test_blocks_of_rows():
    weight = torch.randn(48, 32)
    quantizer = quantizer_for("int4-b16x16", weight)
    assert torch.equal(gathered(quantizer, weight), quantizer(weight))
    assert "border" in (why_not(quantizer, rows_of(48, 0, 4)) or "")


@pytest.mark.parametrize("spec", ["int4-g16", "int4-g16-lsq", "int8-tensor", "int8-tensor-lsq"])
@torch.no_grad()
def test_nan_does_not_become_a_number(spec):
    weight = torch.randn(9, 32)
    quantizer = quantizer_for(spec, weight)
    weight[7, 3] = torch.nan
    assert not torch.isfinite(gathered(quantizer, weight)[7, 3])


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("ternary", "adds up values"),
        ("int4-channel-mse", "adds up values"),
        ("int12-channel", "no smaller"),
    ],
)
def test_what_cannot_be_gathered_says_why(spec, reason):
    weight = torch.randn(8, 32)
    assert reason in (why_not(quantizer_for(spec, weight), rows_of(8, 0, 2)) or "")


def test_a_learned_scale_is_cut_where_its_weight_is():
    weight = torch.randn(6, 32)  # two experts of three rows, which four ranks cannot share out row by row
    assert why_not(quantizer_for("int4-channel-lsq", weight), rows_of(6, 0, 4, unit=3)) is not None
    assert why_not(quantizer_for("int4-channel", weight), rows_of(6, 0, 4, unit=3)) is None


@pytest.mark.parametrize(("spec", "share"), [("int4-g128", 0.27), ("int8-channel", 0.52)])
@torch.no_grad()
def test_bytes(spec, share):
    weight = torch.randn(8, 1024)
    for dtype in (torch.float32, torch.bfloat16):
        quantizer, rows = quantizer_for(spec, weight.to(dtype)), rows_of(8, 0, 2)
        part = weight.to(dtype)[: rows.held]
        sent = encode(quantizer, part, rows, packing=packing_of(quantizer), grid=quantizer.grid(part))
        assert sum(tensor.nbytes for tensor in sent) <= share * part.numel() * 2
