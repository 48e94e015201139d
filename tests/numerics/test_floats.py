"""Minifloats against ml_dtypes (bit patterns, rounding) and torch's float8 casts."""

import ml_dtypes
import numpy as np
import pytest
import torch

from qlightning.numerics import Float

ORACLES = [
    (Float(2, 1), ml_dtypes.float4_e2m1fn),
    (Float(2, 3), ml_dtypes.float6_e2m3fn),
    (Float(3, 2), ml_dtypes.float6_e3m2fn),
    (Float(4, 3), ml_dtypes.float8_e4m3fn),
    (Float(5, 2), ml_dtypes.float8_e5m2),
    (Float(4, 3, specials="ieee"), ml_dtypes.float8_e4m3),
    (Float(3, 4, specials="ieee"), ml_dtypes.float8_e3m4),
]
EVERY = pytest.mark.parametrize(("format", "dtype"), ORACLES, ids=[np.dtype(dtype).name for _, dtype in ORACLES])


def patterns(format: Float, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """All codes and what ml_dtypes says they mean."""
    codes = np.arange(2**format.bits, dtype=np.uint8)
    return codes, codes.view(dtype).astype(np.float32)


def test_a_float_has_the_values_of_the_table():
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert [Float(2, 1).decode(torch.tensor([code])).item() for code in range(8)] == positive
    assert [Float(2, 1).decode(torch.tensor([code + 8])).item() for code in range(8)] == [-v for v in positive]
    largest = {(2, 1): 6, (2, 3): 7.5, (3, 2): 28, (4, 3): 448, (5, 2): 57344}
    assert {em: Float(*em).high for em in largest} == largest
    smallest = {(2, 1): 0.5, (2, 3): 0.125, (3, 2): 0.0625, (4, 3): 2**-9, (5, 2): 2**-16}
    assert {em: Float(*em).values()[-len(Float(*em).values()) // 2 + 1] for em in smallest} == smallest


@EVERY
def test_decode_of_every_code(format, dtype):
    codes, meaning = patterns(format, dtype)
    decoded = format.decode(torch.from_numpy(codes)).numpy()
    finite = np.isfinite(meaning)
    np.testing.assert_array_equal(decoded[finite], meaning[finite])
    np.testing.assert_array_equal(np.signbit(decoded[finite]), np.signbit(meaning[finite]))
    assert np.isnan(decoded[~finite]).all(), "a reserved pattern (infinity too) is no value of the format"


@EVERY
def test_encode_of_every_value(format, dtype):
    codes, meaning = patterns(format, dtype)
    finite = np.isfinite(meaning)
    encoded = format.encode(torch.from_numpy(meaning[finite])).numpy()
    np.testing.assert_array_equal(encoded, codes[finite])
    assert sorted(format.values()) == sorted(meaning[finite].tolist())


@EVERY
def test_rounding_of_random_numbers_ties_and_their_neighbours(format, dtype):
    values = np.unique(np.array(format.values(), dtype=np.float32))
    ties = (values[1:] + values[:-1]) / 2
    near = [np.nextafter(ties, np.float32(sign * np.inf)) for sign in (-1, 1)]
    generator = np.random.default_rng(0)
    spread = generator.standard_normal(20000).astype(np.float32) * np.exp2(generator.uniform(-20, 20, 20000))
    x = np.concatenate([values, ties, *near, np.float32([0.0, -0.0, 1e-45, -1e-45]), spread.astype(np.float32)])
    x = np.concatenate([x, x * format.high / 4])
    expected = np.clip(x, format.low, format.high).astype(np.float32).astype(dtype)
    snapped = format.snap(torch.from_numpy(x.astype(np.float32)), torch.round)
    np.testing.assert_array_equal(snapped.numpy(), expected.astype(np.float32))
    np.testing.assert_array_equal(format.encode(snapped).numpy(), expected.view(np.uint8))


@pytest.mark.parametrize(("format", "dtype"), [(Float(4, 3), torch.float8_e4m3fn), (Float(5, 2), torch.float8_e5m2)])
def test_codes_are_the_bytes_of_torchs_cast(format, dtype):
    torch.manual_seed(0)
    x = torch.randn(50000) * torch.exp2(torch.randint(-18, 16, (50000,)))
    snapped = format.snap(x.clone(), torch.round)
    cast = x.clamp(format.low, format.high).to(dtype)
    assert torch.equal(snapped, cast.float())
    assert torch.equal(format.encode(snapped), cast.view(torch.uint8))


@pytest.mark.parametrize(("exponent", "mantissa"), [(2, 1), (3, 2), (4, 3)])
def test_midpoints_round_up_half_of_the_time(exponent, mantissa):
    """Stochastic rounding acts on the grid of the value's own binade."""
    format = Float(exponent, mantissa)
    values = torch.tensor(sorted(set(format.values())))
    midpoints = (values[1:] + values[:-1]) / 2
    draw = torch.rand(2000, len(midpoints), generator=torch.Generator().manual_seed(0))
    snapped = format.snap(midpoints.expand(2000, -1).clone(), lambda p: torch.floor(p + draw))
    assert torch.equal(torch.minimum(snapped, values[:-1]), values[:-1].expand_as(snapped))
    share = (snapped == values[1:]).float().mean(0)
    assert bool(((share - 0.5).abs() < 5 * (0.25 / 2000) ** 0.5).all())


@pytest.mark.parametrize("arguments", [(1, 2), (6, 1), (2, 0), (2, 6), (5, 3)])
def test_impossible_floats_are_refused(arguments):
    with pytest.raises(ValueError, match=r"for example Float\(4, 3\)"):
        Float(*arguments)
    with pytest.raises(ValueError, match="write 'none', 'nan' or 'ieee'"):
        Float(4, 3, specials="inf")
