"""Equal bins against the formulas of the two papers that use them."""

import pytest
import torch

from qlightning.numerics import AbsMax, AbsMean, Learned, PerChannel, Quantizer, Stochastic, pack, unpack
from qlightning.numerics.bins import Bins
from qlightning.numerics.spec import describe, rebuild


@pytest.mark.parametrize(("levels", "bits"), [(2, 1), (3, 2), (4, 2), (8, 3), (16, 4), (5, 3), (256, 8)])
def test_levels_are_the_middles_of_equal_bins(levels: int, bits: int) -> None:
    format = Bins(levels)
    edges = torch.linspace(-1, 1, levels + 1, dtype=torch.float64)
    assert format.values() == pytest.approx(((edges[1:] + edges[:-1]) / 2).tolist())
    assert (format.bits, format.high, format.low) == (bits, format.values()[-1], format.values()[0])
    inside = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    bin_ = torch.bucketize(inside.double(), edges[1:-1])
    assert torch.allclose(format.snap(inside, torch.round), torch.tensor(format.values())[bin_])


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 16])
def test_codes_are_integers_that_name_the_levels(levels: int) -> None:
    format = Bins(levels)
    q = format.snap(torch.linspace(-1.2, 1.2, 401), torch.round)
    codes = format.encode(q)
    assert codes.dtype == torch.int8
    assert torch.equal(format.decode(codes), q)
    assert torch.allclose(q, (codes.float() + format.offset) * 2 / levels)
    assert sorted(set(codes.tolist())) == list(range(-(levels // 2), (levels - 1) // 2 + 1))
    if levels in (2, 4, 16):
        assert torch.equal(unpack(pack(codes, format.bits), format.bits, len(codes), signed=True), codes)


def test_two_bits_are_the_formula_of_stretched_elastic_quantization() -> None:
    """alpha (round(clamp(w / alpha, +-0.99) n - shift) + shift) / n, with n = 2 and shift = 1/2."""
    w = torch.randn(64, 32)
    alpha = w.abs().amax(1, keepdim=True)
    expected = alpha * (torch.round((w / alpha).clamp(-0.99, 0.99) * 2 - 0.5) + 0.5) / 2
    assert torch.equal(Quantizer(Bins(4), PerChannel(), scale=AbsMax())(w), expected)


def test_ternary_is_the_same_formula_with_one_and_a_half() -> None:
    w = torch.randn(64, 32)
    alpha = w.abs().amax(1, keepdim=True)
    expected = alpha * torch.round((w / alpha).clamp(-0.99, 0.99) * 1.5) / 1.5
    assert torch.allclose(Quantizer(Bins(3), PerChannel(), scale=AbsMax())(w), expected, rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_any_bits_are_the_formula_of_statsq(bits: int) -> None:
    """a (round(clamp(w / a, -1, 1 - 1e-6) n - 1/2) + 1/2) / n, a = 2 mean|w|, n = 2^(b-1)."""
    w, n = torch.randn(64, 32), 2 ** (bits - 1)
    a = 2 * w.abs().mean(1, keepdim=True)
    expected = a * ((torch.round((w / a).clamp(-1, 1 - 1e-6) * n - 0.5) + 0.5) / n)
    assert torch.allclose(Quantizer(Bins(2**bits), PerChannel(), scale=AbsMean(multiplier=2.0))(w), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("levels", [3, 4])
def test_stored_codes_give_the_trained_values(dtype: torch.dtype, levels: int) -> None:
    w = torch.randn(8, 32).to(dtype)
    quantizer = Quantizer(Bins(levels), PerChannel(), scale=Learned())
    quantizer.build((8, 32))
    quantizer.initialize(w)
    assert torch.equal(quantizer.dequantize(quantizer.quantize(w), dtype), quantizer(w))
    assert rebuild(describe(quantizer)) == quantizer


def test_nan_stays_and_stochastic_rounding_is_unbiased_between_levels() -> None:
    assert Bins(4).snap(torch.tensor([float("nan")]), torch.round).isnan().all()
    x = torch.full((1, 20000), 0.1)
    quantizer = Quantizer(Bins(4), scale=Learned(), rounding=Stochastic())
    quantizer.build((1, 20000))
    quantizer.initialize(torch.ones(1, 20000))
    assert quantizer(x).mean().item() == pytest.approx(0.1, abs=0.01)


def test_a_number_of_bins_is_checked() -> None:
    with pytest.raises(ValueError, match=r"Bins\(4\)"):
        Bins(1)
