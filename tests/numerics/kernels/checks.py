"""What every kernel must do on a device: equal its twin. Called by the tests here, and by gpu.py where a GPU is."""

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_same(one: Tensor | None, other: Tensor | None) -> None:
    """The same bits, up to the signs of zeros; NaN where the other has NaN."""
    assert one is not None
    assert other is not None
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def fake_quantize_measures(device: str) -> None:
    from qlightning.numerics.kernels.fake_quant import fake_quantize, fake_quantize_slow

    for dtype in DTYPES:
        for shape in [(5, 3, 32), (7, 100), (2, 4097)]:
            x = draw(*shape, device=device, dtype=dtype)
            x[0] = 0  # a block of zeros has the smallest scale
            options = {"low": -8.0, "high": 7.0, "bound": 7.5, "ships_as": dtype}
            slow = fake_quantize_slow(x, None, **options)
            for fast, twin in zip(fake_quantize(x, None, **options, codes=True), slow, strict=True):
                assert_same(fast, twin)


def fake_quantize_on_a_given_scale(device: str) -> None:
    from qlightning.numerics.kernels.fake_quant import fake_quantize, fake_quantize_slow

    x = draw(6, 4, 48, device=device, dtype=torch.bfloat16)
    scale, zero = draw(6, 4, 1, device=device).abs() * 0.2 + 1e-3, torch.round(draw(6, 4, 1, device=device) * 4)
    for offset in (None, zero):
        slow = fake_quantize_slow(x, scale, offset, low=-128.0, high=127.0)
        for fast, twin in zip(fake_quantize(x, scale, offset, low=-128.0, high=127.0, codes=True), slow, strict=True):
            assert_same(fast, twin)
    ties = torch.arange(-9, 9, device=device, dtype=torch.float32).add(0.5).view(1, 18)
    one = torch.ones(1, 1, device=device)
    assert_same(fake_quantize(ties, one, low=-8.0, high=7.0)[1], ties.round().clamp(-8, 7))


def fake_quantize_shows_nan(device: str) -> None:
    from qlightning.numerics.kernels.fake_quant import fake_quantize, fake_quantize_slow

    x = draw(4, 32, device=device)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    options = {"low": -8.0, "high": 7.0, "bound": 7.5}
    fast, slow = fake_quantize(x, None, **options), fake_quantize_slow(x, None, **options)
    assert_same(fast[0], slow[0])
    assert_same(fast[1], slow[1])
    assert bool(fast[1][1].isnan().all())
    given = fake_quantize(x, torch.ones(4, 1, device=device), low=-8.0, high=7.0)[1]
    assert int(given.isnan().sum()) == 1
    assert float(given[2, 5]) == 7.0


def fake_quantize_backward(device: str) -> None:
    from qlightning.numerics.kernels import fake_quant

    for dtype in DTYPES:
        x, grad = (draw(9, 3, 64, device=device, dtype=dtype, seed=seed) for seed in (0, 1))
        scale, zero = draw(9, 3, 1, device=device, seed=2).abs() * 0.3 + 0.05, torch.round(draw(9, 3, 1, device=device))
        for offset in (None, zero):
            options = {"low": -4.0, "high": 3.0, "factor": 0.25}
            fast = fake_quant.fake_quantize_backward(grad, x, scale, offset, **options)
            slow = fake_quant.fake_quantize_backward_slow(grad, x, scale, offset, **options)
            assert_same(fast[0], slow[0])
            for one, other, per in zip(fast[1:], slow[1:], (4.0, scale), strict=True):
                if other is None:
                    assert one is None
                    continue
                # n terms in another order: n * eps times the sum of magnitudes, each at most 8 (or 1 * step) |grad|
                bound = 64 * 2**-23 * grad.float().abs().sum(-1, keepdim=True) * 2 * per * 0.25 + 1e-12
                assert bool(((one - other).abs() <= bound).all())


def codes_of_columns(device: str) -> None:
    from qlightning.numerics.kernels import columns

    for dtype in DTYPES:
        for shape in [(70, 130), (600, 5), (3, 300)]:
            x = draw(*shape, device=device, dtype=dtype)
            x[:, 1] = 0
            options = {"low": -128.0, "high": 127.0, "bound": 127.5, "ships_as": dtype}
            made, twin = columns.codes_of_columns(x, **options), columns.codes_of_columns_slow(x, **options)
            for fast, slow in zip(made, twin, strict=True):
                assert_same(fast, slow)
            x[2, 3] = float("nan")
            assert columns.codes_of_columns(x, **options)[1].isnan().flatten().tolist() == [
                n == 3 for n in range(shape[1])
            ]


def encoded_operands_are_turned_in_the_kernel(device: str) -> None:
    """Operands of a weight's gradient: the same codes and scales with the kernel as without."""
    from qlightning.layers.on_codes import encoded
    from qlightning.numerics import in_one_pass, parse

    asked = in_one_pass.kernels_act
    for spec in ("int8-channel", "int4-token"):
        x = draw(40, 24, device=device, dtype=torch.bfloat16).t()
        made = []
        for act in (False, True):
            in_one_pass.kernels_act = lambda x, act=act: act
            try:
                made.append(encoded(parse(spec), x, None))
                assert (in_one_pass.codes_of_columns(parse(spec), x) is not None) == act
            finally:
                in_one_pass.kernels_act = asked
        assert_same(made[0].codes, made[1].codes)
        assert_same(made[0].scale, made[1].scale)


def hadamard_quantize(device: str) -> None:
    from qlightning.numerics.kernels import hadamard

    for dtype in (torch.float32, torch.bfloat16):
        for shape, block in [((3, 64), 64), ((2, 2, 96), 32), ((5, 128), 1), ((2, 1024), 1024)]:
            x = draw(*shape, device=device, dtype=dtype)
            options = {"low": -128.0, "high": 127.0, "bound": 127.5, "ships_as": dtype}
            for fast, twin in zip(
                hadamard.hadamard_quantize(x, block, **options),
                hadamard.hadamard_quantize_slow(x, block, **options),
                strict=True,
            ):
                assert_same(fast, twin)


def hadamard_alone(device: str) -> None:
    """Transforms give the same bits with the kernel as without, eagerly and compiled, forward and backward."""
    from qlightning.numerics import hadamard

    torch.library.opcheck(hadamard.rotated, (draw(3, 64, device=device), 16))
    asked = hadamard.kernels_act
    for dtype in DTYPES:
        for shape, block in [
            ((3, 64), 64),
            ((2, 5, 96), 32),
            ((5, 12), 1),
            ((7, 1000), 8),
            ((2, 8192), 8192),
            ((0, 8), 8),
        ]:
            x, results = draw(*shape, device=device, dtype=dtype), []
            for act in (False, True):
                hadamard.kernels_act = lambda x, act=act: act
                try:
                    leaf = x.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
                    y = hadamard.hadamard(leaf, block)
                    y.backward(draw(*shape, device=device, dtype=dtype, seed=1))
                finally:
                    hadamard.kernels_act = asked
                results += [y.detach(), leaf.grad]
            assert_same(results[2], results[0])
            assert_same(results[3], results[1])
    hadamard.kernels_act = lambda x: True
    try:
        compiled = torch.compile(lambda x: hadamard.hadamard(x, 32) + 1, fullgraph=True, backend="aot_eager")
        x = draw(4, 64, device=device)
        assert_same(compiled(x), hadamard.rotate_slow(x, 32) + 1)
    finally:
        hadamard.kernels_act = asked


def unpack_int4(device: str) -> None:
    from qlightning.numerics.kernels import unpack

    packed = torch.randint(256, (12, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).to(device)
    for groups in (1, 3, 6):
        scale, zero = (draw(12, groups, 1, device=device, seed=seed).abs() for seed in (1, 2))
        for signed, offset in ((True, None), (False, zero.mul(9).round())):
            for dtype in DTYPES:
                options = {"dtype": dtype, "signed": signed}
                fast = unpack.unpack_int4(packed, scale, offset, **options)
                assert_same(fast, unpack.unpack_int4_slow(packed, scale, offset, **options))


def packed_codes_are_decoded_by_it(device: str) -> None:
    """What FSDP gathered as packed codes has the same bits with the kernel as without."""
    from qlightning.numerics import packing, parse
    from qlightning.strategies.codes import decoded, encode, packing_of, rows_of

    asked, launches = packing.kernels_act, []
    kernel = packing.unpacked_int4
    for spec in ("int4-g16", "int4-asym-g16", "int4-asym-g16-lsq", "int4-channel-lsq", "int3-channel", "nf4-g16"):
        for dtype in (torch.float32, torch.bfloat16):
            quantizer, weight = parse(spec), draw(12, 48, device=device, dtype=dtype)
            quantizer.build((12, 48))
            quantizer.to(device).initialize(weight)
            how, results = packing_of(quantizer), []
            with torch.no_grad():
                sent = encode(quantizer, weight, rows_of(12, 0, 1), packing=how, grid=quantizer.grid(weight))
                for act in (False, True):
                    packing.kernels_act = lambda x, act=act: act
                    packing.unpacked_int4 = lambda *given, now=(spec, act): launches.append(now) or kernel(*given)
                    try:
                        results.append(decoded(quantizer, sent, (12, 48), packing=how, dtype=dtype))
                    finally:
                        packing.kernels_act, packing.unpacked_int4 = asked, kernel
                assert_same(results[1], results[0])
                assert_same(results[1], quantizer(weight))
    assert [spec for spec, _ in launches[::2]] == ["int4-g16", "int4-asym-g16", "int4-asym-g16-lsq", "int4-channel-lsq"]
    assert all(act for _, act in launches)


def scaled_product(device: str) -> None:
    from qlightning.numerics.kernels import product

    generator = torch.Generator().manual_seed(0)
    for m, n, k in [(16, 32, 64), (33, 48, 80), (7, 100, 136)]:
        a, b = (torch.randint(-128, 128, (rows, k), generator=generator).to(device, torch.int8) for rows in (m, n))
        rows, columns = draw(m, device=device).abs(), draw(n, device=device, seed=1).abs()
        for bias in (None, draw(n, device=device, seed=2)):
            for dtype in (torch.float32, torch.bfloat16):
                fast = product.scaled_product(a, b, rows, columns, bias, dtype)
                slow = product.scaled_product_slow(a, b, rows, columns, bias, dtype)
                if bias is None:
                    assert_same(fast, slow)
                else:  # the last product and the sum may be one fused operation
                    spacing = torch.finfo(dtype).eps * slow.abs().float() + 2**-23 * (slow.float() - bias).abs()
                    assert bool(((fast.float() - slow.float()).abs() <= spacing).all())


def grouped_product(device: str) -> None:
    from qlightning.numerics.kernels import grouped_product as kernel

    generator = torch.Generator().manual_seed(0)
    for m, n, k, groups in [(16, 32, 64, 2), (33, 48, 192, 3), (7, 100, 256, 1)]:
        a, b = (torch.randint(-128, 128, (rows, k), generator=generator).to(device, torch.int8) for rows in (m, n))
        rows, columns = draw(m, device=device).abs(), draw(n, groups, device=device, seed=1).abs()
        for bias in (None, draw(n, device=device, seed=2)):
            for dtype in (torch.float32, torch.bfloat16):
                given = a, b, rows, columns, bias, dtype
                assert_same(kernel.grouped_product(*given), kernel.grouped_product_slow(*given))


def scaled_product_by_descriptors(device: str) -> None:
    """What Hopper's copy engine does, which the interpreter can do too; K in multiples of 16 bytes."""
    from qlightning.numerics.kernels import product

    if device == "cpu":  # there it is made to believe in three multiprocessors
        product.copies_blocks, product.processors = lambda x: True, lambda x: 3
    for m, n, k in [(16, 32, 64), (33, 48, 80), (70, 104, 144)]:
        generator = torch.Generator().manual_seed(m)
        a, b = (torch.randint(-128, 128, (rows, k), generator=generator).to(device, torch.int8) for rows in (m, n))
        rows, columns = draw(m, device=device).abs(), draw(n, device=device, seed=1).abs()
        slow = product.scaled_product_slow(a, b, rows, columns, None, torch.bfloat16)
        assert_same(product.scaled_product(a, b, rows, columns, None, torch.bfloat16), slow)


def scaled_product_is_compiled(device: str) -> None:
    """Without a graph break, and without an operator of Python's between the compiled kernels."""
    from qlightning.numerics.kernels import product

    a, b = (torch.ones(rows, 64, dtype=torch.int8, device=device) for rows in (32, 48))
    arguments = (a, b, torch.ones(32, device=device), torch.full((48,), 0.5, device=device), None, torch.bfloat16)
    compiled = torch.compile(lambda *given: product.scaled_product(*given) + 1, fullgraph=True)
    assert_same(compiled(*arguments), torch.full((32, 48), 33.0, dtype=torch.bfloat16, device=device))


def quantizers_take_them(device: str) -> None:
    """Quantizers give the same bits with kernels as without; on a CPU they are made to believe in a GPU."""
    from qlightning.numerics import in_one_pass, parse

    asked = in_one_pass.kernels_act
    specs = ["int4-g16", "int8-token", "int4-asym-g16-lsq", "ternary-channel", "int4-channel-lsq", "int3-b4x16"]
    for spec in specs:
        for dtype in (torch.float32, torch.bfloat16):
            quantizer = parse(spec)
            x = draw(12, 48, device=device, dtype=dtype)
            quantizer.build((-1, 48) if spec.endswith("token") else (12, 48))
            quantizer.to(device).initialize(x)
            results, launched = [], 0
            for act in (False, True):
                in_one_pass.kernels_act = lambda x, act=act: act
                try:
                    leaf = x.clone().requires_grad_()
                    y = quantizer(leaf)
                    y.backward(draw(12, 48, device=device, dtype=dtype, seed=1))
                    with torch.no_grad():
                        grid = quantizer.grid(x)
                        both = quantizer.values_and_codes(x, grid, None)
                        launched += (
                            in_one_pass.values_and_codes(quantizer, x, grid, values=True, codes=False) is not None
                        )
                        alone = quantizer.codes(x, grid, None)
                finally:
                    in_one_pass.kernels_act = asked
                grads = [p.grad.clone() for p in quantizer.parameters()]
                quantizer.zero_grad()
                results.append(([y.detach(), leaf.grad, *both, alone], grads))
            assert launched == 1, spec
            for slow, fast in zip(results[0][0], results[1][0], strict=True):
                assert_same(fast, slow)
            for slow, fast in zip(results[0][1], results[1][1], strict=True):
                torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


def all_checks(device: str) -> Iterator[Callable[[str], None]]:
    """Every check of this file that a device can do."""
    if device == "cuda":  # the interpreter's functions are none that compile
        yield scaled_product_is_compiled
    yield from (
        fake_quantize_measures,
        fake_quantize_on_a_given_scale,
        fake_quantize_shows_nan,
        fake_quantize_backward,
        codes_of_columns,
        encoded_operands_are_turned_in_the_kernel,
        hadamard_quantize,
        hadamard_alone,
        unpack_int4,
        packed_codes_are_decoded_by_it,
        scaled_product,
        grouped_product,
        scaled_product_by_descriptors,
        quantizers_take_them,
    )


def main(device: str) -> None:
    """Say of each check whether it passed, a line each."""
    for check in all_checks(device):
        try:
            check(device)
            said = ""
        except Exception as error:
            said = f"{type(error).__name__}: {error}".replace("\n", " ").replace("\t", " ") or "failed"
        print(f"{check.__name__}\t{said}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
