"""The same bits on CPU and GPU. Sums (means, MSE search, gradients of scales) depend on the order of addition there."""

import pytest
import torch

from qlightning.numerics import (
    AbsMax,
    AbsMedian,
    Float,
    Int,
    Learned,
    MinMax,
    Percentile,
    PerGroup,
    PowerOfTwo,
    Quantizer,
    TwoLevel,
    pack,
    parse,
    unpack,
)
from qlightning.numerics.statistics import divide

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SPECS = ["int4-g128", "int8-token", "int3-channel", "int4-asym-g128", "int8-asym-token", "int8-tensor", "int16-narrow"]
SPECS += ["fp8e4m3-token", "fp8e5m2-channel", "fp6e2m3-g32", "fp6e3m2-g32", "fp4e2m1-g16", "nf4-g64", "log4", "uint4"]
SPECS += ["nvfp4", "mxfp4", "mxfp8e4m3", "mxfp6e2m3", "int4-p99-channel", "int4-absmedian", "ternary-absmax"]
SPECS += [
    "binary-absmax",
    "int4-g128-clip",
    "nvfp4-clip",
    "int4-sfp16",
    "int4-g128-sr",
    "nvfp4-sr",
    "int8-asym-token-sr",
]


@pytest.mark.parametrize("by", [6.0, 7.5, 15.0, 127.5, 255.0, 448.0])
def test_division_is_correctly_rounded(by):
    x = torch.randn(10_000)
    expected = (x.double() / by).float()
    assert torch.equal(divide(x, by), expected)
    if torch.cuda.is_available():
        assert torch.equal(divide(x.cuda(), by).cpu(), expected)


def both(quantizer: Quantizer, x: torch.Tensor) -> list[list[torch.Tensor]]:
    """What it computes on each device: values, gradient, codes, scale, zero point, tensor scale."""
    results = []
    for device in ("cpu", "cuda"):
        leaf = x.detach().to(device, copy=True).requires_grad_()
        quantizer.to(device)
        y = quantizer(leaf)
        y.backward(torch.linspace(-1, 1, x.numel()).view_as(x).to(x.dtype).to(device))
        stored = [t for t in quantizer.quantize(leaf.detach()) if t is not None]
        assert torch.equal(quantizer.dequantize(quantizer.quantize(leaf.detach()), x.dtype), y)
        results.append([t.detach().cpu() for t in (y, leaf.grad, *stored)])
    return results


def same(on_cpu: torch.Tensor, on_gpu: torch.Tensor) -> bool:
    """Equal, zeros of either sign included; 8-bit floats by their bytes."""
    assert on_cpu.dtype == on_gpu.dtype
    if on_cpu.element_size() == 1:
        return torch.equal(on_cpu.view(torch.uint8), on_gpu.view(torch.uint8))
    return torch.equal(on_cpu, on_gpu)


@gpu
@pytest.mark.parametrize("spec", SPECS)
def test_cpu_and_gpu_compute_the_same_bits(spec):
    x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-4, 2, 256)[:, None]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for on_cpu, on_gpu in zip(*both(parse(spec).train(), x.to(dtype)), strict=True):
            assert same(on_cpu, on_gpu)


@gpu
@pytest.mark.parametrize(
    "scale",
    [AbsMax(), Percentile(95), AbsMedian(), TwoLevel(rounding="up")]
    + [PowerOfTwo(rule=rule) for rule in ("floor", "ceil", "rceil", "even")],
    ids=repr,
)
def test_every_exact_scale_is_the_same_on_both(scale):
    x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(1))
    for on_cpu, on_gpu in zip(*both(Quantizer(Float(2, 1), PerGroup(16), scale=scale), x), strict=True):
        assert same(on_cpu, on_gpu)


@gpu
def test_a_learned_quantizer_moves_with_its_checkpoint():
    x = torch.randn(64, 128)
    for format, source in ((Int(4), AbsMax()), (Int(4, symmetric=False), MinMax())):
        quantizer = Quantizer(format, PerGroup(32), scale=Learned(source))
        quantizer.build((64, 128))
        quantizer.initialize(x)
        for on_cpu, on_gpu in zip(*both(quantizer, x), strict=True):
            assert torch.equal(on_cpu, on_gpu)
        gradients = [p.grad.clone() for p in quantizer.parameters()]
        assert all(g.is_cuda and bool(g.isfinite().all()) for g in gradients)


@gpu
def test_packing_on_the_gpu():
    for bits in (1, 2, 3, 4, 6, 8):
        codes = torch.randint(0, 2**bits, (64, 128), dtype=torch.uint8)
        packed = pack(codes.cuda(), bits)
        assert torch.equal(packed.cpu(), pack(codes, bits))
        assert torch.equal(unpack(packed, bits, 128, signed=False).cpu(), codes)
