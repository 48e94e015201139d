"""Products of codes with a scale per group against exact arithmetic and the kernel's twin."""

import pytest
import torch

from qlightning.numerics.code_product import Coded, product_of_codes
from qlightning.numerics.grouped_product import int8_sums, product_in_groups


def operands(m: int, n: int, k: int, groups: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, (rows, k), generator=generator).to(torch.int8) for rows in (m, n))
    return a, b, torch.rand(m, generator=generator) + 0.5, torch.rand(n, groups, generator=generator) + 0.5


@pytest.mark.parametrize(("m", "n", "k", "groups"), [(1, 1, 2, 2), (7, 5, 33, 3), (32, 16, 2048, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_product_of_decoded_operands_within_the_bound(m, n, k, groups, bias) -> None:
    a, b, rows, columns = operands(m, n, k, groups)
    added = torch.randn(n) if bias else None
    y = product_in_groups(a, b, rows, columns, added, torch.float32)
    x, w = a.double() * rows.double()[:, None], b.double() * columns.double().repeat_interleave(k // groups, 1)
    wanted = x @ w.t() + (0 if added is None else added.double())
    bound = (groups + 3) * 2.0**-24 * (x.abs() @ w.abs().t()) + 2.0**-23 * wanted.abs()
    assert bool(((y - wanted).abs() <= bound).all())


def test_it_is_the_kernels_twin_bit_for_bit() -> None:
    pytest.importorskip("triton")
    from qlightning.numerics.kernels.grouped_product import grouped_product_slow

    given = *operands(9, 12, 96, 3), torch.randn(12), torch.bfloat16
    assert torch.equal(product_in_groups(*given), grouped_product_slow(*given))


def test_scales_in_columns_say_that_there_are_groups() -> None:
    a, b, rows, columns = operands(6, 5, 32, 4)
    y = product_of_codes(Coded(a, rows), Coded(b, columns), None, torch.float32)
    assert torch.equal(y, product_in_groups(a, b, rows, columns, None, torch.float32))


def test_sums_of_slices_are_those_of_copies() -> None:
    a, b, _, _ = operands(6, 5, 64, 1)
    assert torch.equal(int8_sums(a[:, 32:], b[:, 32:]), int8_sums(a[:, 32:].clone(), b[:, 32:].clone()))


def test_the_kernel_is_an_operator() -> None:
    given = *operands(6, 5, 64, 2), None, torch.bfloat16
    made = torch.ops.qlightning.grouped_int8(*(t.to("meta") for t in given[:4]), None, torch.bfloat16)
    assert (made.shape, made.dtype) == ((6, 5), torch.bfloat16)
