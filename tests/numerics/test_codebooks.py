"""Tables as formats: NF4 against bitsandbytes on CPU, log grids against their formula."""

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlightning.numerics import NF4, Levels, PerGroup, Quantizer, log_levels, pack

tables = st.lists(st.integers(-1000, 1000), min_size=2, max_size=256, unique=True).map(
    lambda t: [v / 16 for v in sorted(t)]
)


def test_nf4_is_the_table_of_bitsandbytes():
    _, state = bnb.quantize_4bit(torch.ones(64), blocksize=64, quant_type="nf4")
    assert torch.equal(torch.tensor(NF4), state.code)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_codes_scales_and_values_are_those_of_bitsandbytes(dtype):
    """bitsandbytes packs the first value into the high nibble and always ships float32 scales."""
    torch.manual_seed(0)
    w = torch.randn(64, 256).to(dtype)
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    quantizer = Quantizer(Levels(NF4), PerGroup(64), scale_dtype=torch.float32)
    codes, scale, *_ = quantizer.quantize(w)
    pairs = codes.reshape(-1, 2).flip(-1)
    assert torch.equal(pack(pairs, 4), packed)
    assert torch.equal(scale.flatten(), state.absmax)
    assert torch.equal(quantizer(w), bnb.dequantize_4bit(packed, state))


def test_nf4_ties_go_down_as_in_bitsandbytes():
    table = np.array(NF4, dtype=np.float32)
    ties = ((table[1:].astype(np.float64) + table[:-1]) / 2).astype(np.float32)
    x = torch.zeros(64)
    x[: len(ties)], x[-1] = torch.from_numpy(ties), 1.0
    packed, _ = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")
    theirs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], -1).flatten()
    ours = Quantizer(Levels(NF4), PerGroup(64)).quantize(x).codes
    # a midpoint that float32 cannot hold is decided by its own rounding: there the two may differ by the tie's side
    exact = torch.from_numpy(ties.astype(np.float64) * 2 == table[1:].astype(np.float64) + table[:-1])
    rest = torch.cat([exact, torch.ones(64 - len(ties), dtype=torch.bool)])
    assert int(exact.sum()) >= 3
    assert torch.equal(ours[rest], theirs[rest])
    assert int((ours.int() - theirs.int()).abs().max()) <= 1


@given(table=tables, v=st.floats(-70, 70, width=32))
def test_snap_is_the_nearest_entry_and_the_code_its_index(table, v):
    format = Levels(table)
    q = format.snap(torch.tensor([v], dtype=torch.float32), torch.round)
    distances = [abs(entry - v) for entry in table]
    index = format.encode(q).item()
    assert table[index] == q.item()
    assert distances[index] <= min(distances) + 1e-5


@given(table=tables)
def test_random_tables_round_trip(table):
    format = Levels(table)
    codes = torch.arange(len(table), dtype=torch.uint8)
    assert format.decode(codes).tolist() == table
    assert torch.equal(format.encode(format.decode(codes)), codes)
    assert format.bound == max(-table[0], table[-1])
    assert 2 ** (format.bits - 1) < len(table) <= 2**format.bits


def test_a_symmetric_table_is_scaled_to_cover_absmax():
    x = torch.tensor([[0.1, -4.0, 2.2, 0.9]])
    assert Quantizer(log_levels(3))(x).tolist() == [[0.0, -4.0, 2.0, 1.0]]


@pytest.mark.parametrize(("bits", "base"), [(2, 2.0), (4, 2.0), (4, 2**0.5), (8, 1.1)])
def test_log_levels_are_powers_of_the_base(bits, base):
    table = np.array(log_levels(bits, base=base).table)
    assert len(table) == 2**bits - 1
    positive = table[table > 0]
    np.testing.assert_allclose(positive[1:] / positive[:-1], base, rtol=1e-12)
    np.testing.assert_array_equal(-table[::-1], table)
    assert positive[-1] == 1


@pytest.mark.parametrize("table", [[], [1.0], [1.0, 1.0], [2.0, 1.0], list(range(257))])
def test_what_is_no_table_is_refused(table):
    with pytest.raises(ValueError, match="2 to 256 strictly ascending"):
        Levels(table)


@pytest.mark.parametrize(("bits", "base"), [(1, 2.0), (9, 2.0), (4, 1.0), (4, -2.0)])
def test_impossible_log_grids_are_refused(bits, base):
    with pytest.raises(ValueError, match="2 to 8 bits, a base above 1"):
        log_levels(bits, base=base)
