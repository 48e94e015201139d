"""MX and NVFP4 scales against the published tables: golden bytes, exponent rules, signal-to-noise ratios."""

import ml_dtypes
import numpy as np
import pytest
import torch

from qlightning.numerics import Float, Int, PerGroup, PowerOfTwo, Quantizer, Stochastic, TwoLevel, pack, parse

RULES = ["floor", "ceil", "rceil", "even"]


def exponent_codes(amax: list[float], rule: str) -> list[int]:
    """The E8M0 byte of one MXFP4 block per maximum."""
    x = torch.tensor(amax)[:, None] * torch.tensor([1.0, *[0.25] * 31])
    grid = Quantizer(Float(2, 1), PerGroup(32), scale=PowerOfTwo(rule=rule)).grid(x)
    return grid.scale.to(torch.float8_e8m0fnu).view(torch.uint8).flatten().tolist()


@pytest.mark.parametrize(
    ("rule", "codes"),
    [
        ("floor", [126, 126, 126, 127, 127, 127, 127, 127, 128]),
        ("ceil", [127, 127, 127, 127, 128, 128, 128, 128, 128]),
        ("rceil", [126, 127, 127, 127, 127, 127, 128, 128, 128]),
        ("even", [126, 126, 127, 127, 127, 127, 127, 128, 128]),
    ],
)
def test_mxfp4_exponent_rules(rule, codes):
    assert exponent_codes([3, 3.1, 3.5, 4, 5, 6, 6.01, 7, 8], rule) == codes
    assert exponent_codes([0.0, float("nan"), float("inf")], rule) == [0, 255, 255]


@pytest.mark.parametrize("rule", RULES)
def test_exponents_against_log2_in_float64(rule):
    """Over the whole range of float32, powers of two and their neighbours included."""
    powers = np.exp2(np.arange(-120, 127)).astype(np.float32)
    amax = np.concatenate(
        [np.nextafter(powers, np.float32(0)), powers, np.nextafter(powers, np.float32(np.inf)), 1.3 * powers]
    )
    a = amax.astype(np.float64)
    floor_log2 = np.array([np.frexp(v)[1] - 1 for v in a])
    largest = (amax / np.float32(6)).astype(np.float64)
    expected = {
        "floor": floor_log2 - 2,
        "ceil": floor_log2 + (np.exp2(floor_log2) < a) - 2,
        "rceil": np.array([np.frexp(v)[1] - (np.frexp(v)[0] == 0.5) for v in largest]),
        "even": np.array([np.frexp(v)[1] - 1 for v in a + np.exp2(floor_log2) / 4]) - 2,
    }[rule]
    assert exponent_codes(amax.tolist(), rule) == np.clip(expected + 127, 0, 254).astype(int).tolist()


def test_scales_ship_as_the_e8m0_of_ml_dtypes():
    exponents = np.arange(-125, 126)
    x = torch.from_numpy(np.exp2(exponents + 2).astype(np.float32))[:, None].expand(-1, 32)
    stored = parse("mxfp4").quantize(x).scale
    assert stored.dtype == torch.float8_e8m0fnu
    theirs = stored.view(torch.uint8).numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(theirs.flatten(), np.exp2(exponents).astype(np.float32))
    np.testing.assert_array_equal(stored.float().numpy(), theirs)
    smallest = parse("mxfp4").quantize(torch.full((1, 32), 1e-44)).scale
    assert smallest.view(torch.uint8).item() == 0
    assert smallest.float().item() == 2.0**-127


@pytest.mark.parametrize("rule", ["rceil", "ceil"])
def test_ceiling_rules_never_saturate_and_floor_does(rule):
    x = torch.randn(500, 32)
    grid = Quantizer(Float(2, 1), PerGroup(32), scale=PowerOfTwo(rule=rule)).grid(x)
    assert bool((x.abs() / grid.scale[:, 0] <= 6).all())
    floor = parse("mxfp4").grid(x)
    assert bool((x.abs() / floor.scale[:, 0] > 6).any())


def test_nvfp4_golden_vector():
    rows = [
        [-3 + i / 2 for i in range(16)],
        [(i - 7) / 8 for i in range(16)],
        [0.0] * 16,
        [2.0**-12] * 15 + [2.0**-11],
    ]
    x = torch.tensor(rows)
    codes, scale, zero, tensor_scale = parse("nvfp4").quantize(x)
    packed = [bytes(row.tolist()).hex(" ") for row in pack(codes, 4)]
    assert packed == [
        "de cd 9b 10 43 55 66 77",
        "ef de bc 0a 32 54 66 77",
        "00 00 00 00 00 00 00 00",
        "55 55 55 55 55 55 55 75",
    ]
    assert scale.view(torch.uint8).flatten().tolist() == [0x7E, 0x6C, 0x00, 0x14]
    assert zero is None
    torch.testing.assert_close(tensor_scale, torch.tensor([597.33333]))
    values = parse("nvfp4")(x)
    torch.testing.assert_close(values[1, 15].item(), 0.96429, rtol=1e-5, atol=0)
    assert torch.equal(values[2], torch.zeros(16))


def test_a_block_far_below_the_tensors_maximum_becomes_zeros():
    x = torch.cat([torch.full((1, 16), 1e-6), torch.full((1, 16), 1.0)])
    y = parse("nvfp4")(x)
    assert torch.equal(y[0], torch.zeros(16))
    assert bool((y[1] > 0.9).all())
    assert torch.equal(parse("nvfp4")(torch.zeros(2, 16)), torch.zeros(2, 16))


@pytest.mark.parametrize("largest", [1e-44, 1e-38, 1e-30, 1e30, 3e38])
def test_extreme_tensors_keep_finite_values(largest):
    x = torch.linspace(-1, 1, 32).reshape(2, 16) * largest
    for spec in ("nvfp4", "mxfp4-g16", "mxfp8e4m3-g16"):
        y = parse(spec)(x)
        assert bool(y.isfinite().all())
        if 1e-30 <= largest <= 1e30:
            assert float((y - x).abs().max()) < 0.26 * largest, "8 becomes 6 at worst"


def test_scales_rounded_up_never_clip_the_maximum():
    x = torch.randn(2000, 16)
    up = Quantizer(Float(2, 1), PerGroup(16), scale=TwoLevel(rounding="up"))
    nearest = parse("nvfp4")
    reach = {
        name: (x.abs().amax(-1) / q.grid(x).step.flatten()).max().item() for name, q in (("up", up), ("rne", nearest))
    }
    assert reach["up"] <= 6 * (1 + 1e-6)
    assert reach["rne"] > 6.1
    ratio = up.grid(x).scale / nearest.grid(x).scale
    assert bool((ratio >= 1).all())
    assert 0.3 < float((ratio > 1).float().mean()) < 0.7
    stored = up.quantize(x).scale
    assert torch.equal(stored.float(), up.grid(x).scale)


def qsnr(x: torch.Tensor, quantizer: Quantizer) -> float:
    x = x.double()
    error = quantizer(x.float()).double() - x
    return float(10 * torch.log10(x.square().mean() / error.square().mean()))


def mx(rule: str, group: int = 32, **parts) -> Quantizer:
    return Quantizer(Float(2, 1), PerGroup(group), scale=PowerOfTwo(rule=rule), **parts)


@pytest.mark.parametrize("distribution", ["normal", "laplace"])
def test_signal_to_noise_ratios_are_the_published_ones(distribution):
    """Table of the low-precision cards, made with 4 M samples; 1 M here, so 0.08 dB instead of 0.05."""
    generator = torch.Generator().manual_seed(0)
    if distribution == "normal":
        x = torch.randn(2**15, 32, generator=generator)
    else:
        uniform = torch.rand(2**15, 32, generator=generator, dtype=torch.float64) - 0.5
        x = (-uniform.sign() * torch.log1p(-2 * uniform.abs())).float()
    int4 = Int(4, range="narrow")
    rows = {
        "NVFP4": (parse("nvfp4"), 20.44, 20.66),
        "NVFP4 SR": (Quantizer(Float(2, 1), PerGroup(16), scale=TwoLevel(), rounding=Stochastic()), 17.24, 17.39),
        "MXFP4 floor": (mx("floor"), 18.78, 17.95),
        "MXFP4 ceil": (mx("ceil"), 16.82, 15.39),
        "MXFP4 rceil": (mx("rceil"), 18.75, 17.59),
        "MXFP4 rceil SR": (mx("rceil", rounding=Stochastic()), 15.66, 14.50),
        "MXFP4 even": (mx("even"), 19.02, 18.15),
        "E8M0 block 16 rceil": (mx("rceil", 16), 18.95, 18.20),
        "INT4/16": (Quantizer(int4, PerGroup(16)), 21.39, 19.90),
        "INT4/32": (Quantizer(int4, PerGroup(32)), 20.26, 18.34),
    }
    expected = {name: row[1 if distribution == "normal" else 2] for name, row in rows.items()}
    measured = {name: qsnr(x, row[0].train()) for name, row in rows.items()}
    assert measured == pytest.approx(expected, abs=0.08)


def test_nan_and_infinity_reach_every_value_that_shares_the_scale():
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(2, 64)
        x[0, 3] = bad
        mxfp4, nvfp4 = parse("mxfp4")(x), parse("nvfp4")(x)
        assert bool(mxfp4[0, :32].isnan().all())
        assert bool(mxfp4[0, 32:].isfinite().all())
        assert bool(mxfp4[1].isfinite().all())
        assert bool(nvfp4.isnan().all()), "the tensor scale is shared by all"


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="write 'floor', 'ceil', 'rceil' or 'even'"):
        PowerOfTwo(rule="round")
    with pytest.raises(ValueError, match="write 'nearest' or 'up'"):
        TwoLevel(rounding="down")
    with pytest.raises(ValueError, match="leave scale_dtype out"):
        Quantizer(Float(2, 1), PerGroup(16), scale=TwoLevel(), scale_dtype=torch.bfloat16)
