"""Products of codes against exact arithmetic."""

import pytest
import torch

from qlightning.numerics.code_product import LONGEST, Coded, product_of_codes
from qlightning.numerics.grouped_product import padded as with_zeros


def coded(rows: int, k: int, seed: int, scales: int | None = None) -> Coded:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (rows, k), generator=generator).to(torch.int8)
    return Coded(codes, torch.rand(scales or rows, 1, generator=generator) + 0.5)


def exact(a: Coded, b: Coded) -> torch.Tensor:
    return (a.codes.double() @ b.codes.double().t()) * a.scale.double() * b.scale.double().reshape(1, -1)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (7, 5, 33), (32, 16, 2048)])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_is_exact_up_to_the_scalings(m, n, k, bias) -> None:
    a, b = coded(m, k, 0), coded(n, k, 1)
    added = torch.randn(n) if bias else None
    y = product_of_codes(a, b, added, torch.float32)
    wanted = exact(a, b) + (0 if added is None else added)
    assert bool(((y - wanted).abs() <= 4 * 2.0**-24 * (exact(a, b).abs() + wanted.abs())).all())


def test_sums_at_the_edge_of_32_bits() -> None:
    a = Coded(torch.full((1, LONGEST), -128, dtype=torch.int8), torch.ones(1, 1))
    assert float(product_of_codes(a, a, None, torch.float64)) == pytest.approx(LONGEST * 128**2, rel=1e-7)
    longer = Coded(torch.zeros(1, LONGEST + 1, dtype=torch.int8), torch.ones(1, 1))
    with pytest.raises(ValueError, match="32 bits"):
        product_of_codes(longer, longer, None, torch.float32)


def test_one_scale_may_serve_all_rows() -> None:
    a, b = coded(6, 8, 0, 1), coded(5, 8, 1, 1)
    torch.testing.assert_close(product_of_codes(a, b, None, torch.float64).double(), exact(a, b), rtol=1e-6, atol=0)


def test_float8() -> None:
    a, b = (torch.randn(rows, 32).to(torch.float8_e4m3fn) for rows in (6, 5))
    y = product_of_codes(Coded(a, torch.full((6, 1), 0.5)), Coded(b, torch.full((5, 1), 2.0)), None, torch.float32)
    torch.testing.assert_close(y, (a.double() @ b.double().t()).float(), rtol=1e-5, atol=1e-5)


def test_two_kinds_of_codes_are_refused() -> None:
    other = Coded(torch.randn(5, 8).to(torch.float8_e4m3fn), torch.ones(5, 1))
    with pytest.raises(ValueError, match="both int8 or both E4M3"):
        product_of_codes(coded(6, 8, 0), other, None, torch.float32)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_padding_adds_zeros(dtype) -> None:
    codes = torch.randn(5, 12).mul(4).to(dtype)
    padded = with_zeros(codes, 32, 8)
    assert padded.shape == (32, 16)
    assert padded.is_contiguous()
    assert torch.equal(padded[:5, :12].float(), codes.float())
    assert float(padded.float().abs().sum()) == float(codes.float().abs().sum())
    assert with_zeros(codes, 5, 4).data_ptr() == codes.data_ptr()
