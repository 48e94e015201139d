"""Measured scales against numpy and brute force, and the dtype in which they ship."""

import copy
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from qlightning.numerics import (
    MSE,
    NF4,
    AbsMax,
    AbsMean,
    AbsMedian,
    Binary,
    Float,
    Int,
    Levels,
    LSQStep,
    MinMax,
    Percentile,
    PerGroup,
    Quantizer,
    Ternary,
    parse,
)

blocks = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=33),
    elements=st.floats(-(2.0**20), 2.0**20, width=32),
)


@given(x=blocks)
def test_statistics_equal_numpys(x):
    """Order statistics exactly, means to float32 summation error."""
    magnitude, t = np.abs(x), torch.from_numpy(x)

    def measured(scale, format=Int(4)):  # noqa: B008
        return scale.measure(t, format)[0].numpy()[:, 0]

    np.testing.assert_array_equal(measured(AbsMax()), magnitude.max(-1) / np.float32(7.5))
    np.testing.assert_array_equal(measured(AbsMax(), Float(2, 1)), magnitude.max(-1) / np.float32(6))
    np.testing.assert_array_equal(measured(AbsMedian()), np.percentile(magnitude, 50, axis=-1, method="lower"))
    np.testing.assert_array_equal(measured(Percentile(100)), measured(AbsMax()))
    for percent in (10, 50, 75, 90, 99.9):
        exact = np.percentile(magnitude, percent, axis=-1, method="inverted_cdf") / np.float32(7.5)
        np.testing.assert_array_equal(measured(Percentile(percent)), exact)
    mean = magnitude.mean(-1, dtype=np.float64)
    np.testing.assert_allclose(measured(AbsMean()), mean, rtol=1e-5, atol=1e-38)
    np.testing.assert_allclose(measured(AbsMean(multiplier=0.7)), 0.7 * mean, rtol=1e-5, atol=1e-38)
    np.testing.assert_allclose(measured(LSQStep()), 2 * mean / np.sqrt(7), rtol=1e-5, atol=1e-38)


@given(x=blocks, bits=st.integers(1, 8))
def test_min_max_covers_the_block_and_zero(x, bits):
    format = Int(bits, symmetric=False)
    grid = Quantizer(format, PerGroup(x.shape[1])).grid(torch.from_numpy(x))
    low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
    expected = np.maximum((high - low) / np.float32(2**bits - 1), np.finfo(np.float32).tiny)
    np.testing.assert_array_equal(grid.scale.flatten().numpy(), expected)
    zero = grid.zero_point.flatten().numpy()
    np.testing.assert_array_equal(zero, np.clip(np.rint(format.low - low / expected), format.low, format.high))
    assert bool(((format.low - zero) * expected <= low + expected * 0.51).all())
    assert bool(((format.high - zero) * expected >= high - expected * 0.51).all())


@pytest.mark.parametrize("percent", ["99.9", "99.99", "99", "66.6", "0.1"])
def test_the_rank_of_a_percentile_is_exact(percent):
    for n in (1, 2, 10, 100, 999, 1000, 1001, 4096):
        x = torch.arange(1.0, n + 1).flip(0).reshape(1, n)
        rank = max(1, ceil(Fraction(percent) * n / 100))
        assert float(Percentile(float(percent)).measure(x, Ternary())[0]) == rank


def squared_errors(x: np.ndarray, format, ratios, power: float) -> np.ndarray:
    """(ratios, blocks): error of clipping at each share of the full range, in float64."""
    errors = []
    values = np.array(format.values())
    for ratio in ratios:
        if format.symmetric:
            step = np.abs(x).max(-1, keepdims=True) / format.bound * ratio
            v = x / step
            nearest = values[np.abs(v[..., None] - values).argmin(-1)]
            y = nearest * step
        else:
            low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
            step = (high - low) / (format.high - format.low) * ratio
            zero = np.rint(format.low - low * ratio / step)
            y = (np.clip(np.rint(x / step + zero), format.low, format.high) - zero) * step
        errors.append((np.abs(y - x) ** power).sum(-1))
    return np.stack(errors)


@pytest.mark.parametrize("power", [2.0, 2.4])
@pytest.mark.parametrize(
    "format",
    [Int(2), Int(4), Int(3, range="narrow"), Int(3, symmetric=False), Float(2, 1), Levels(NF4)],
    ids=lambda f: repr(f)[:16],
)
def test_mse_search_equals_brute_force(format, power):
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)) ** 3
    scale = MSE(steps=30, floor=0.3, power=power)
    y = Quantizer(format, PerGroup(32), scale=scale)(x).double().numpy()
    x64 = x.double().numpy()
    searched = squared_errors(x64, format, np.linspace(1, 0.3, 30), power).min(0)
    np.testing.assert_allclose((np.abs(y - x64) ** power).sum(-1), searched, rtol=1e-4)
    dense = squared_errors(x64, format, np.linspace(1, 0.3, 2000), power).min(0)
    assert searched.sum() <= 1.05 * dense.sum(), "thirty ratios come close to two thousand"
    assert searched.sum() < 0.97 * squared_errors(x64, format, [1], power).sum(), "clipping must pay"


@given(x=blocks)
def test_mse_is_never_worse_than_absmax(x):
    t = torch.from_numpy(x)
    plain = Quantizer(Int(3), PerGroup(x.shape[1]))
    searched = Quantizer(Int(3), PerGroup(x.shape[1]), scale=MSE(steps=10))
    error = [(q(t).double() - t.double()).square().sum(-1) for q in (searched, plain)]
    assert bool((error[0] <= error[1] * (1 + 1e-5)).all())


RULES = [AbsMax(), AbsMean(), AbsMedian(), LSQStep(), Percentile(99.0), MSE(steps=8)]
SHIPPED = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("scale_dtype", [None, *SHIPPED])
@pytest.mark.parametrize("dtype", [*SHIPPED, torch.float64])
def test_training_uses_the_scale_that_ships(dtype, scale_dtype):
    x = (torch.randn(4, 64) * torch.tensor([[1e-6], [1.0], [30.0], [0.0]])).to(dtype)
    expected = scale_dtype or (torch.float32 if dtype == torch.float64 else dtype)
    for format, rules in ((Int(4), RULES), (Int(4, symmetric=False), [MinMax(), MSE(steps=8)])):
        for scale in rules:
            quantizer = Quantizer(format, PerGroup(16), scale=scale, scale_dtype=scale_dtype)
            shipped, grid = quantizer.quantize(x).scale, quantizer.grid(x)
            assert shipped.dtype == expected
            assert grid.scale.dtype == torch.float32
            assert torch.equal(shipped.float(), grid.scale)
            assert bool((grid.scale > 0).all())
            ideal = scale.measure(PerGroup(16).view(x), format)[0]
            smallest = 2.0**-24 if expected == torch.float16 else torch.finfo(torch.float32).tiny
            torch.testing.assert_close(grid.scale, ideal, rtol=torch.finfo(expected).eps, atol=smallest)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "float"])
@pytest.mark.parametrize("spec", ["int4-lsq", "int4-asym-lsq", "int8-ema", "int8-asym-ema-sbf16", "int4-sr"])
def test_casting_the_model_leaves_scales_alone(spec, cast):
    x = torch.randn(6, 16)
    quantizer = parse(spec)
    quantizer.build((6, 16))
    quantizer.initialize(x)
    model = nn.Sequential(nn.Linear(16, 16), quantizer)
    before = copy.deepcopy(quantizer.state_dict())
    parameters = dict(quantizer.named_parameters())
    getattr(model, cast)()
    assert model[0].weight.dtype == {"bfloat16": torch.bfloat16, "half": torch.float16, "double": torch.float64}.get(
        cast, torch.float32
    )
    after = quantizer.state_dict()
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)
    assert all(p is parameters[name] for name, p in quantizer.named_parameters())
    assert quantizer.eval()(x.to(model[0].weight.dtype)).dtype == model[0].weight.dtype


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AbsMean(multiplier=0), r"for example AbsMean\(multiplier=1.0\)"),
        (lambda: AbsMedian(multiplier=float("nan")), r"for example AbsMedian\(multiplier=1.0\)"),
        (lambda: Percentile(0), r"for example Percentile\(99.9\)"),
        (lambda: Percentile(101), r"for example Percentile\(99.9\)"),
        (lambda: MSE(steps=1), r"for example MSE\(steps=40, floor=0.2\)"),
        (lambda: MSE(floor=1), r"for example MSE\(steps=40, floor=0.2\)"),
        (lambda: MSE(power=0), r"for example MSE\(steps=40, floor=0.2\)"),
    ],
)
def test_impossible_scales_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_scale_must_suit_its_format():
    with pytest.raises(ValueError, match=r"write scale=MinMax\(\)"):
        Quantizer(Int(4, symmetric=False), scale=AbsMax())
    for format in (Int(4), Binary(), Float(2, 1)):
        with pytest.raises(ValueError, match=r"write scale=AbsMax\(\)"):
            Quantizer(format, scale=MinMax())
    with pytest.raises(ValueError, match=r"write torch\.float32, torch\.bfloat16 or torch\.float16"):
        Quantizer(Int(4), scale_dtype=torch.float64)


def test_a_scale_that_overflows_what_it_ships_in_is_no_finite_number():
    x = torch.tensor([[1e6, -2e6]])
    quantizer = Quantizer(Int(4), scale_dtype=torch.float16)
    assert not bool(quantizer(x).isfinite().any())
    with pytest.raises(ValueError, match=r"overflows torch\.float16 .* 'sfp32'"):
        quantizer.quantize(x)
    assert bool(Quantizer(Int(4), scale_dtype=torch.float32).quantize(x).scale.isfinite().all())
