"""The quantizer as a whole: train = deploy bit for bit, properties of the values, hard inputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlightning.numerics import (
    EMA,
    LSQ,
    MSE,
    NF4,
    AbsMax,
    AbsMean,
    AbsMedian,
    Binary,
    ClippedSTE,
    Float,
    Int,
    Learned,
    Levels,
    LSQStep,
    MinMax,
    PerBlock,
    Percentile,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    PowerOfTwo,
    Quantized,
    Quantizer,
    Stochastic,
    Ternary,
    TwoLevel,
    UInt,
    log_levels,
    parse,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SYMMETRIC = [
    *(Int(bits) for bits in (2, 3, 4, 6, 8, 12, 16)),
    *(Int(bits, range="narrow") for bits in (2, 4, 8)),
    *(UInt(bits) for bits in (1, 4, 8)),
    *(Float(e, m) for e, m in ((2, 1), (2, 3), (3, 2), (4, 3), (5, 2))),
    Ternary(),
    Binary(),
    Levels(NF4),
    Levels([-2.0, 0.5, 1.0]),
    log_levels(4),
]
ASYMMETRIC = [Int(bits, symmetric=False) for bits in (1, 2, 3, 4, 8, 12, 16)]
GRANULARITIES = [PerTensor(), PerChannel(), PerToken(), PerGroup(8), PerBlock(3, 16)]
DYNAMIC = [AbsMax, AbsMean, AbsMedian, LSQStep, lambda: Percentile(90), lambda: MSE(steps=4), PowerOfTwo, TwoLevel]
DYNAMIC += [lambda: PowerOfTwo(rule="even"), lambda: TwoLevel(rounding="up")]
STATIC = [EMA, Learned, lambda: Learned(LSQStep())]
ASYMMETRIC_SCALES = [MinMax, lambda: MSE(steps=4), EMA, Learned]


def built(format, granularity, make, x: Tensor, **parts) -> Quantizer:
    """A quantizer ready for x; a learned step a little off, as after some training."""
    quantizer = Quantizer(format, granularity, scale=make(), **parts)
    quantizer.build(tuple(x.shape))
    quantizer.initialize(x)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter *= 0.83
    return quantizer


def assert_train_is_deploy(quantizer: Quantizer, x: Tensor) -> None:
    y = quantizer(x)
    stored = quantizer.quantize(x)
    restored = quantizer.dequantize(stored, x.dtype)
    assert y.shape == restored.shape == stored.codes.shape == x.shape
    assert y.dtype == restored.dtype == x.dtype
    assert bool(y.isfinite().all())
    assert torch.equal(y, restored), quantizer
    assert stored.codes.dtype == quantizer.format.code_dtype
    assert tuple(stored.scale.shape) == quantizer.granularity.scale_shape(tuple(x.shape))
    if stored.zero_point is not None:
        assert stored.zero_point.dtype == quantizer.format.code_dtype
        assert stored.zero_point.shape == stored.scale.shape


def hard_matrix(dtype: torch.dtype) -> Tensor:
    """Gaussian rows of very different size, a row of zeros, and a row with an outlier."""
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    return (x * torch.tensor([1.0, 1e-3, 30.0, 0.0, 1.0, 0.3])[:, None] + (x > 2) * 20).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", SYMMETRIC, ids=lambda format: repr(format)[:24])
def test_forward_is_dequantize_of_quantize(format, dtype):
    x = hard_matrix(dtype)
    for granularity in GRANULARITIES:
        for make in [*DYNAMIC, *STATIC]:
            assert_train_is_deploy(built(format, granularity, make, x).eval(), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ASYMMETRIC, ids=repr)
def test_forward_is_dequantize_of_quantize_with_zero_points(format, dtype):
    for granularity in GRANULARITIES:
        for make in ASYMMETRIC_SCALES:
            for x in (hard_matrix(dtype), hard_matrix(dtype).abs(), -hard_matrix(dtype).abs()):
                assert_train_is_deploy(built(format, granularity, make, x).eval(), x)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_is_dequantize_of_quantize_for_every_scale_dtype_and_rounding(dtype, scale_dtype):
    x = hard_matrix(dtype)
    for format in (Int(4), Int(8, symmetric=False), Float(4, 3), Levels(NF4)):
        for make in [AbsMax if format.symmetric else MinMax, EMA, Learned]:
            for gradient, rounding in ((LSQ(), None), (ClippedSTE(), Stochastic())):
                parts = {"scale_dtype": scale_dtype, "gradient": gradient, "rounding": rounding}
                quantizer = built(format, PerGroup(8), make, x, **parts)
                assert_train_is_deploy(quantizer.eval(), x)
                if rounding is not None and make is not EMA:
                    assert_train_is_deploy(quantizer.train(), x)


def test_values_codes_and_decode_are_the_same_arithmetic():
    """What the layers use: one grid, values or codes of it, and values of codes in float32."""
    x = hard_matrix(torch.bfloat16)
    for spec in ("int8-token", "int4-asym-g8", "nvfp4", "mxfp4-g16", "int4-g8-sr", "binary"):
        quantizer = parse(spec).train()
        grid, key = quantizer.prepare(x), quantizer.rounding.key()
        codes = quantizer.codes(x, grid, key)
        assert torch.equal(quantizer.decode(codes, grid).to(x.dtype), quantizer.values(x, grid, key))
        assert torch.equal(quantizer(x), quantizer.values(x, grid, key))
        assert quantizer.decode(codes, grid).dtype == torch.float32
        values, same_codes = quantizer.values_and_codes(x, grid, key)
        assert torch.equal(values, quantizer.values(x, grid, key))
        assert torch.equal(same_codes, codes)


# --- properties ---

matrices = hnp.arrays(
    "float32", hnp.array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.floats(-1e4, 1e4, width=16)
).map(torch.from_numpy)
grids = st.integers(-8, 8).map(lambda k: 2.0**k)


@given(x=matrices, step=grids)
def test_idempotent_on_a_fixed_grid(x, step):
    for format in (*SYMMETRIC, *ASYMMETRIC):
        quantizer = Quantizer(format, scale=Learned(), scale_dtype=torch.float32)
        quantizer.build((-1, -1))
        quantizer.scale.ready = True
        with torch.no_grad():
            quantizer.scale.value.fill_(step * 1.1)
            if quantizer.scale.lower is not None:
                quantizer.scale.lower.fill_(-1.7 * step)
        y = quantizer(x)
        assert torch.equal(quantizer(y), y)


@given(x=matrices)
def test_idempotent_with_power_of_two_scales(x):
    for format in (Float(2, 1), Float(2, 3), Float(3, 2), Float(4, 3), Float(5, 2)):
        for rule in ("floor", "rceil"):
            quantizer = Quantizer(format, PerGroup(x.shape[1]), scale=PowerOfTwo(rule=rule))
            y = quantizer(x)
            again = quantizer(y)
            if rule == "rceil":
                assert torch.equal(again, y)
            else:
                assert torch.equal(quantizer.values(y, quantizer.grid(x), None), y)
    narrow = Quantizer(Int(4, range="narrow"), PerGroup(x.shape[1]), scale=PowerOfTwo(rule="rceil"))
    y = narrow(x)
    assert torch.equal(narrow.values(y, narrow.grid(x), None), y)


@given(x=matrices)
def test_values_stay_within_the_range_and_half_a_step(x):
    columns = x.shape[1]
    for format in SYMMETRIC:
        quantizer = Quantizer(format, PerGroup(columns))
        y, grid = quantizer(x), quantizer.grid(x)
        largest = x.abs().amax(-1, keepdim=True)
        reach = max(-format.low, format.high) / format.bound
        assert bool((y.abs() <= largest * reach * (1 + 1e-6) + grid.scale[..., 0] * 1e-6 + 1e-37).all())
        values = torch.tensor(sorted({*format.values(), 0.0}) if isinstance(format, Binary) else format.values())
        widest = float((values[1:] - values[:-1]).max())
        inside = (x >= format.low * grid.step[..., 0]) & (x <= format.high * grid.step[..., 0])
        allowed = widest * grid.step[..., 0] * (0.5 + 1e-3) * (2 if isinstance(format, Binary) else 1)
        assert bool(((y - x).abs() <= allowed + 1e-37)[inside].all())


@given(x=matrices)
def test_sign_symmetry(x):
    for format in (Int(4, range="narrow"), Int(8, range="narrow"), Float(2, 1), Float(4, 3), Float(5, 2), Ternary()):
        for make in (AbsMax, AbsMean, lambda: MSE(steps=3), PowerOfTwo, TwoLevel):
            quantizer = Quantizer(format, PerGroup(x.shape[1]), scale=make())
            assert torch.equal(quantizer(-x), -quantizer(x))


@given(x=matrices)
def test_monotone_within_a_block(x):
    x = x.sort(-1).values
    for format in (*SYMMETRIC, *ASYMMETRIC):
        y = Quantizer(format, PerGroup(x.shape[1]))(x)
        assert bool((y[:, 1:] >= y[:, :-1]).all())


@given(x=matrices, power=st.integers(-10, 10))
def test_a_power_of_two_passes_through(x, power):
    factor = 2.0**power
    for spec in ("int4-channel", "int4-asym-channel", "fp8e4m3-channel", "nf4-channel", "mxfp4-channel", "ternary"):
        quantizer = parse(spec)
        assert torch.equal(quantizer(x * factor), quantizer(x) * factor)


@given(
    shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=1, max_side=4),
    dtype=st.sampled_from(DTYPES),
    spec=st.sampled_from(["int4-token", "int8-tensor", "int4-asym-tensor", "fp8e4m3-token", "ternary", "nf4-tensor"]),
)
def test_any_shape_and_dtype(shape, dtype, spec):
    if spec.endswith("token") and not shape:
        return
    x = torch.randn(shape).to(dtype)
    assert_train_is_deploy(parse(spec), x)
    strided = torch.randn(*shape, 2).to(dtype)[..., 0]
    assert torch.equal(parse(spec)(strided), parse(spec)(strided.contiguous()))


# --- hard inputs ---

SPECS = ["int4-g8", "int8-token", "int4-asym-g8", "fp8e4m3-token", "fp4e2m1-g8", "nvfp4-g8", "mxfp4-g8", "nf4-g8"]
SPECS += ["ternary-channel", "int4-g8-mse", "int4-asym-g8-mse", "int4-g8-absmean", "log4", "int2-narrow"]
EVERY = pytest.mark.parametrize("spec", SPECS)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_stay_zeros(spec, dtype):
    quantizer = parse(spec)
    x = torch.zeros(2, 8, dtype=dtype)
    for zeros in (x, -x):
        assert torch.equal(quantizer(zeros), x)
        assert torch.equal(quantizer.dequantize(quantizer.quantize(zeros), dtype), x)
    x[1] = 1
    assert torch.equal(quantizer(x)[0], torch.zeros(8, dtype=dtype))
    assert bool(quantizer(x)[1].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_binary_has_no_zero_and_keeps_a_zero_block_tiny(dtype):
    y = parse("binary")(torch.zeros(2, 8, dtype=dtype))
    assert bool((y > 0).all())
    assert float(y.max()) <= 2.0**-24


@EVERY
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_never_become_finite_numbers(spec, dtype, bad):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    clean = parse(spec)(x)
    x[1, 3] = bad
    y = parse(spec)(x)
    assert not bool(y[1].isfinite().any()), "all that share the scale are spoilt"
    if spec != "nvfp4-g8":
        rest = torch.tensor([0, 2, 3])
        assert torch.equal(y[rest], clean[rest]), "and nothing else"
    with pytest.raises(ValueError, match="cannot quantize a tensor with 1 NaN or infinite values of 32"):
        parse(spec).quantize(x)


@pytest.mark.parametrize("spec", ["int8-tensor-ema", "int4-lsq", "int4-asym-lsq", "int4-p50-channel", "int4-absmedian"])
def test_scales_that_do_not_cover_their_block_keep_nan_and_saturate_infinity(spec):
    x = torch.randn(4, 8)
    quantizer = parse(spec)
    quantizer.build((4, 8))
    quantizer.initialize(x)
    quantizer.eval()
    x[1, 3] = float("nan")
    assert bool(quantizer(x)[1, 3].isnan())
    x[1, 3] = float("inf")
    assert quantizer(x)[1, 3] == quantizer(x.nan_to_num(posinf=1e30))[1, 3]
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        quantizer.quantize(x)


@EVERY
def test_subnormal_inputs_stay_finite_and_small(spec):
    for dtype, largest in ((torch.float32, 1e-40), (torch.float16, 6e-8), (torch.bfloat16, 1e-39)):
        x = (torch.linspace(-1, 1, 16).reshape(2, 8) * largest).to(dtype)
        assert float(x.abs().max()) > 0
        quantizer = parse(spec)
        assert_train_is_deploy(quantizer, x)
        assert float(quantizer(x).abs().max()) <= 2 * torch.finfo(dtype).tiny


@EVERY
def test_values_near_the_largest_number_stay_finite(spec):
    x = (torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) - 0.5) * 1e38
    assert_train_is_deploy(parse(spec), x)


@EVERY
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0,)])
def test_empty_in_empty_out(spec, shape):
    x = torch.empty(shape, requires_grad=True)
    quantizer = parse(spec)
    y = quantizer(x)
    assert y.shape == x.shape
    y.sum().backward()
    stored = quantizer.quantize(x)
    assert stored.codes.shape == x.shape
    assert stored.codes.dtype == quantizer.format.code_dtype
    assert quantizer.dequantize(stored, torch.bfloat16).shape == x.shape


def test_a_stored_tensor_is_all_that_deployment_needs():
    """codes, scale and zero point of one quantizer, decoded by a fresh one of the same spec."""
    x = torch.randn(4, 16)
    for spec in ("int4-g8-lsq", "int4-asym-g8-lsq", "nvfp4", "int8-tensor-ema"):
        quantizer = parse(spec)
        quantizer.build((4, 16))
        quantizer.initialize(x)
        quantizer.eval()
        stored = quantizer.quantize(x)
        assert isinstance(stored, Quantized)
        assert torch.equal(parse(spec).dequantize(stored, torch.float32), quantizer(x))


class NewTensors(TorchDispatchMode):
    """Counts the storages of at least so many bytes that operations make."""

    def __init__(self, least):
        super().__init__()
        self.least, self.count, self.known = least, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.known |= {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.untyped_storage().nbytes() >= self.least:
            self.count += made.untyped_storage().data_ptr() not in self.known
        return made


@pytest.mark.parametrize("spec", ["int4-g32", "int8-asym-token", "ternary", "int4-channel-lsq"])
def test_values_are_made_in_one_new_tensor(spec):
    """New memory costs a training step on a CPU more than the arithmetic does."""
    quantizer, x = parse(spec), torch.randn(512, 512)
    quantizer.build((512, 512))
    quantizer.initialize(x)
    grid = quantizer.grid(x)
    with NewTensors(x.nbytes) as new, torch.no_grad():
        quantizer.on_grid(x, grid, None)
    assert new.count == 1
    with NewTensors(x.nbytes) as new, torch.no_grad():
        quantizer.grid(x)
    assert new.count == 0
