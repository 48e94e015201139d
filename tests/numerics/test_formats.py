"""Formats against brute force over their own values, and integers against torch.iinfo."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlightning.numerics import NF4, Binary, Float, Format, Int, Levels, Stochastic, Ternary, UInt, log_levels

SYMMETRIC = [
    *(Int(bits) for bits in range(2, 10)),
    *(Int(bits, range="narrow") for bits in range(2, 10)),
    *(UInt(bits) for bits in range(1, 9)),
    *(Float(e, m) for e, m in ((2, 1), (2, 3), (3, 2), (4, 3), (5, 2), (3, 1), (2, 5))),
    Ternary(),
    Binary(),
    Levels(NF4),
    Levels([-3.0, -1.0, 0.25, 7.0]),
    log_levels(3),
    log_levels(4, base=1.5),
]
FORMATS = [*SYMMETRIC, *(Int(bits, symmetric=False) for bits in range(1, 10)), Int(16), Int(12, range="narrow")]
EVERY = pytest.mark.parametrize("format", FORMATS, ids=repr)

positions = st.floats(-1.25, 1.25, width=32)


def value_tensor(format: Format) -> torch.Tensor:
    return torch.tensor(format.values(), dtype=torch.float32)


@EVERY
def test_decode_inverts_encode(format):
    values = value_tensor(format)
    codes = format.encode(values)
    assert codes.dtype == format.code_dtype
    assert codes.shape == values.shape
    assert torch.equal(format.decode(codes), values)
    assert torch.equal(torch.signbit(format.decode(codes)), torch.signbit(values))
    assert len(set(codes.tolist())) == len(values)


@EVERY
def test_codes_fit_their_bits(format):
    codes = format.encode(value_tensor(format)).long()
    floor = 0 if format.code_dtype == torch.uint8 else -(2 ** (format.bits - 1))
    assert floor <= int(codes.min())
    assert int(codes.max()) < floor + 2**format.bits
    if len(codes) > 1:
        assert format.bits == 1 or len(codes) > 2 ** (format.bits - 1), "a narrower code would do"


@EVERY
def test_values_are_ascending_and_span_low_to_high(format):
    values = format.values()
    assert values == sorted(values)
    assert (values[0], values[-1]) == (format.low, format.high)
    if format.symmetric:
        assert format.high <= format.bound <= max(-format.low, format.high)


@EVERY
def test_representable_values_stay(format):
    """Also under stochastic rounding, for every random number that can be drawn."""
    values = value_tensor(format)
    assert torch.equal(format.snap(values.clone(), torch.round), values)
    rounding = Stochastic().train()
    for step in range(20):
        rounding.step.fill_(step)
        key = rounding.key()
        assert torch.equal(format.snap(values.clone(), lambda v, key=key: rounding.round(v, key)), values)
    if format.bits <= 9:
        largest_draw = lambda v: torch.floor(v) + (v - torch.floor(v) > 1 - 2.0**-24)  # noqa: E731
        assert torch.equal(format.snap(values.clone(), largest_draw), values)


@EVERY
def test_snap_takes_the_nearest_value_and_saturates(format):
    span = format.high - format.low
    v = torch.linspace(format.low - 0.1 * span, format.high + 0.1 * span, 4001)
    values = np.array(format.values())
    v64 = v.double().numpy()
    above = np.clip(np.searchsorted(values, v64), 1, len(values) - 1)
    smallest = np.minimum(np.abs(values[above] - v64), np.abs(values[above - 1] - v64))
    error = np.abs(format.snap(v.clone(), torch.round).double().numpy() - v64)
    np.testing.assert_allclose(error, smallest, rtol=0, atol=1e-7 * span)


@EVERY
def test_snap_is_monotone(format):
    span = format.high - format.low
    v = torch.linspace(format.low - 0.1 * span, format.high + 0.1 * span, 4001)
    q = format.snap(v.clone(), torch.round)
    assert bool((q[1:] >= q[:-1]).all())


@EVERY
def test_nan_stays_and_infinity_saturates(format):
    v = torch.tensor([float("nan"), float("inf"), -float("inf")])
    q = format.snap(v, torch.round)
    assert q[0].isnan()
    assert q[1:].tolist() == [format.high, format.low]


@pytest.mark.parametrize("format", [f for f in SYMMETRIC if f.low == -f.high and not isinstance(f, Levels)], ids=repr)
@given(share=positions)
def test_sign_symmetry(format, share):
    v = torch.tensor([share * format.high])
    if isinstance(format, Binary) and share == 0:
        return
    assert torch.equal(format.snap(-v, torch.round), -format.snap(v.clone(), torch.round))


@EVERY
def test_tables_do_not_depend_on_the_default_dtype(format):
    v = torch.linspace(format.low, format.high, 777, dtype=torch.float32)
    snapped = format.snap(v.clone(), torch.round)
    codes = format.encode(snapped)
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = format.snap(v.clone(), torch.round)
        assert torch.equal(again, snapped)
        assert torch.equal(format.encode(again), codes)
        assert torch.equal(format.decode(codes), snapped)
        assert format.decode(codes).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.int8), (16, torch.int16)])
def test_int_ranges_are_those_of_torch(bits, dtype):
    info = torch.iinfo(dtype)
    for format in (Int(bits), Int(bits, symmetric=False)):
        assert (format.low, format.high) == (info.min, info.max)
        assert format.code_dtype == dtype
    assert Int(bits, range="narrow").low == -info.max
    assert UInt(8).high == torch.iinfo(torch.uint8).max


def test_bound_centres_the_full_range():
    assert [Int(bits).bound for bits in (2, 3, 4, 8)] == [1.5, 3.5, 7.5, 127.5]
    assert [Int(bits, range="narrow").bound for bits in (2, 3, 4, 8)] == [1, 3, 7, 127]
    assert [UInt(bits).bound for bits in (1, 4, 8)] == [1, 15, 255]


@given(v=st.floats(-1e4, 1e4, width=32))
def test_integer_ties_go_to_even_as_in_numpy(v):
    for format in (Int(8), Ternary(), UInt(4), Int(3, symmetric=False)):
        for value in (v, round(v) + 0.5):
            expected = np.clip(np.rint(np.float32(value)), format.low, format.high)
            assert format.snap(torch.tensor([value], dtype=torch.float32), torch.round).item() == expected


def test_binary_is_the_sign_and_zero_is_positive():
    tiny = torch.finfo(torch.float32).tiny
    v = torch.tensor([-2.0, -1.0, -0.5, -1e-8, -tiny, -0.0, 0.0, tiny, 1e-8, 0.5, 1.0, 2.0])
    expected = torch.tensor([-1.0] * 5 + [1.0] * 7)
    q = Binary().snap(v, torch.round)
    assert torch.equal(q, expected)
    assert Binary().encode(q).tolist() == [1] * 5 + [0] * 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Int(0), r"1 to 16 bits, for example Int\(4\)"),
        (lambda: Int(17), r"1 to 16 bits"),
        (lambda: Int(1), r"write Binary\(\), or 'binary'"),
        (lambda: Int(4, range="half"), r"write range='full' or range='narrow'"),
        (lambda: Int(4, symmetric=False, range="narrow"), r"write Int\(4, symmetric=False\)"),
        (lambda: UInt(0), r"for example UInt\(8\)"),
        (lambda: UInt(9), r"for example UInt\(8\)"),
    ],
)
def test_impossible_formats_are_refused_with_a_correction(make, message):
    with pytest.raises(ValueError, match=message):
        make()
