"""What all ranks send of their rows, decoded, is the quantized whole, bit for bit."""

import pytest
import torch
import torch.distributed as dist

from qlightning.numerics import (
    AbsMean,
    Int,
    LSQStep,
    PerGroup,
    Quantizer,
)
from qlightning.numerics.absmax_over import AbsMaxOver
from qlightning.numerics.bins import Bins
from qlightning.numerics.cover import Cover
from qlightning.numerics.microscaling import TwoLevel
from qlightning.numerics.spec import parse
from qlightning.strategies.codes import arrived, encode, on_rows, packing_of, rows_of, why_not
from qlightning.strategies.pool import OverRanks

WITHIN_ROWS = [
    *("int8-channel", "int4-g16", "int4-g16-asym", "int3-channel-asym", "int2-channel-lsq", "int4-g16-lsq"),
    *("int4-g16-asym-lsq", "nf4-g16", "fp4e2m1-g16", "log4-channel", "mxfp4", "mxfp8e4m3", "fp8e4m3-channel"),
    *(
        "binary-channel-lsq",
        "int6-channel",
        "int5-channel",
        "int4-g16-sfp16",
        "binary",
        "ternary-channel",
        "ternary-g16",
    ),
    *("int4-channel-mse", "int4-g16-asym-mse", "int4-channel-absmedian", "int4-g16-p99", "gguf-q8_0", "gguf-q4_1"),
]
OVER_RANKS = [
    *("int8-tensor", "int8-tensor-asym", "int8-tensor-lsq", "nvfp4", "ternary", "int4-tensor-absmean-sfp16"),
    *("ternary-absmedian", "int4-tensor-p90", "int4-tensor-mse", "int4-tensor-asym-mse"),
    Quantizer(Int(4), scale=LSQStep()),
    Quantizer(Int(4), scale=AbsMaxOver(7)),
    Quantizer(Int(4, symmetric=False), scale=Cover()),
    Quantizer(Bins(4), scale=AbsMean(multiplier=2.0)),
    Quantizer(Int(4), PerGroup(16), scale=TwoLevel(rounding="up")),
]
RANKS = 3


def quantizer_for(spec, weight):
    quantizer = parse(spec) if isinstance(spec, str) else spec
    quantizer.build(tuple(weight.shape))
    quantizer.initialize(weight)
    return quantizer


def shard(quantizer, weight, rank, count):
    """(rows, matrix, the scale's parameters for them), as FSDP2 would cut them."""
    rows, local = rows_of(len(weight), rank, count), {}
    for name, value in quantizer.scale.named_parameters(recurse=False):
        each = -(-len(value) // count)
        whole = quantizer.granularity.shared_rows is None
        local[name] = value.detach() if whole else value.detach()[rank * each : (rank + 1) * each]
    return rows, weight[rows.start : rows.start + rows.held], local


def gathered(quantizer, weight):
    """What a rank decodes, of what all of them sent."""
    rank, count = dist.get_rank(), dist.get_world_size()
    rows, part, local = shard(quantizer, weight, rank, count)
    packing = packing_of(quantizer)
    with on_rows(quantizer, rows, local, OverRanks(dist.group.WORLD, weight.numel())):
        sent = encode(quantizer, part, rows, packing=packing, grid=quantizer.grid(part))
    received = []
    for tensor in sent:
        octets = tensor.view(torch.uint8)
        pieces = [torch.empty_like(octets) for _ in range(count)]
        dist.all_gather(pieces, octets)  # all ranks send as much, or it fails
        received.append(torch.cat(pieces).view(tensor.dtype))
    stored = arrived(quantizer, tuple(received), tuple(weight.shape), packing=packing)
    return quantizer.dequantize(stored, weight.dtype)


@torch.no_grad()
def same_bits(count):
    """The specs whose gathered values are not those of the whole weight, on weights of so many rows."""
    failed = []
    for spec in (*WITHIN_ROWS, *OVER_RANKS):
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.randn(count, 32).mul_(torch.rand(count, 1)).to(dtype)
            quantizer = quantizer_for(spec, weight)
            assert why_not(quantizer, rows_of(count, 0, RANKS)) is None, spec
            values = gathered(quantizer, weight)
            assert values.dtype == dtype
            if not torch.equal(values, quantizer(weight)):
                failed.append((str(spec), dtype))
    return failed


@pytest.mark.parametrize("count", [9, 10, 4], ids=["even", "short", "empty"])
def test_bit_for_bit(ranks, count):
    assert ranks(RANKS, same_bits, count) == [[]] * RANKS


@torch.no_grad()
def test_a_large_weight(ranks):
    """Long enough that torch's own sums differ from cut to cut."""

    def check():
        torch.manual_seed(1)
        weight = torch.randn(70, 1024)
        specs = ("ternary", "ternary-absmedian", "int8-tensor-mse", "binary", "int4-channel-mse")
        return [torch.equal(gathered(q := quantizer_for(spec, weight), weight), q(weight)) for spec in specs]

    assert ranks(4, check) == [[True] * 5] * 4


def test_blocks_of_rows(ranks):
    def check():
        torch.manual_seed(1)
        weight = torch.randn(48, 32)
        quantizer = quantizer_for("int4-b16x16", weight)
        return torch.equal(gathered(quantizer, weight), quantizer(weight))

    assert ranks(RANKS, check) == [True] * RANKS
    assert "border" in (why_not(quantizer_for("int4-b16x16", torch.ones(48, 32)), rows_of(48, 0, 4)) or "")


@torch.no_grad()
def test_nan_does_not_become_a_number(ranks):
    specs = (
        "int4-g16",
        "int4-g16-lsq",
        "int8-tensor",
        "int8-tensor-lsq",
        "ternary",
        "ternary-absmedian",
        "mxfp4",
        "nvfp4",
    )

    def check():
        found = {}
        for spec in specs:
            torch.manual_seed(1)
            weight = torch.randn(9, 32)
            quantizer = quantizer_for(spec, weight)
            weight[7, 3] = torch.nan
            found[spec] = gathered(quantizer, weight)[7, 3].isfinite().item()
        return found

    assert ranks(RANKS, check) == [dict.fromkeys(specs, False)] * RANKS


@pytest.mark.parametrize(
    ("spec", "reason"),
    [("gguf-q4_0", "other bits"), ("int12-channel", "no smaller")],
)
def test_what_cannot_be_gathered_says_why(spec, reason):
    weight = torch.randn(8, 32)
    assert reason in (why_not(quantizer_for(spec, weight), rows_of(8, 0, 2)) or "")


def test_a_learned_scale_is_cut_where_its_weight_is():
    weight = torch.randn(6, 32)  # two experts of three rows, which four ranks cannot share out row by row
    assert why_not(quantizer_for("int4-channel-lsq", weight), rows_of(6, 0, 4, unit=3)) is not None
    assert why_not(quantizer_for("int4-channel", weight), rows_of(6, 0, 4, unit=3)) is None


@pytest.mark.parametrize(("spec", "share"), [("int4-g128", 0.27), ("int8-channel", 0.52), ("ternary", 0.14)])
@torch.no_grad()
def test_bytes(spec, share):
    weight = torch.randn(8, 1024)
    for dtype in (torch.float32, torch.bfloat16):
        quantizer, rows = quantizer_for(spec, weight.to(dtype)), rows_of(8, 0, 2)
        part = weight.to(dtype)[: rows.held]
        sent = encode(quantizer, part, rows, packing=packing_of(quantizer), grid=quantizer.grid(part))
        assert sum(tensor.nbytes for tensor in sent) <= share * part.numel() * 2
