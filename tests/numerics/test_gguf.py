"""The grids of GGUF are those that the gguf package's own quantizer finds, bit for bit."""

import gguf
import numpy as np
import pytest
import torch

from qlightning.numerics.gguf import HalfAway
from qlightning.numerics.spec import parse, unparse


def theirs(x, kind):
    kind = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(x.float().numpy(), kind), kind))


def values(dtype):
    """Normal ones, ones with many ties, zeros, and blocks whose scales are subnormal in float16."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    x[8:16] = (x[8:16] * 8).round() / 16
    x[16] = 0
    x[17, ::2] = 0
    x[18:20] *= 1e-5
    x[20] = torch.linspace(-127, 127, 64)
    x[21] = torch.arange(64) - 31.5
    x[21, 0] = x[21, 32] = 127
    return x.to(dtype)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_are_theirs(kind, dtype):
    x, quantizer = values(dtype), parse(f"gguf-{kind.lower()}")
    stored = quantizer.quantize(x)
    assert stored.scale.dtype == torch.float16
    assert torch.equal(quantizer(x), quantizer.dequantize(stored, dtype))
    ours, expected = quantizer.dequantize(stored, torch.float32), theirs(x, kind)
    other = ours != expected
    assert int(other.sum()) <= (1 if kind == "Q8_0" else 0)  # ties, which x * (1 / step) misses
    step = quantizer.grid(x).inner.expand(64, 2, 32).reshape(64, 64)
    assert bool(((x.float() / step)[other].frac().abs() == 0.5).all())


def test_the_minimum_is_a_float16():
    x, quantizer = values(torch.float32), parse("gguf-q4_1")
    stored = quantizer.quantize(x)
    step = stored.scale.double()
    minimum = step * (-8 - stored.zero_point.double())
    assert torch.equal(minimum.half().double(), minimum)
    blocks = x.view(64, 2, 32)
    covered = (blocks.amax(-1).clamp(min=0) - blocks.amin(-1).clamp(max=0))[..., None]
    assert bool((step * 15 >= covered.double() * (1 - 2**-20)).all())
    assert bool((quantizer(x).view(64, 2, 32) - blocks).abs().le(stored.scale.float() * 1.01).all())


@pytest.mark.parametrize("spec", ["gguf-q4_0", "gguf-q4_1", "gguf-q8_0", "gguf-q4_0-lsq", "gguf-q8_0-clip"])
def test_specs(spec):
    quantizer = parse(spec)
    assert unparse(quantizer) == spec
    assert parse(unparse(quantizer)) == quantizer
    assert (quantizer.scale.ships_as or quantizer.scale_dtype) == torch.float16


def test_other_names():
    assert parse("gguf-tq2_0") == parse("gguf-tq1_0") == parse("ternary-g256-sfp16")
    assert parse("gguf-mxfp4") == parse("mxfp4")
    with pytest.raises(ValueError, match="did you mean 'gguf-q4_0'"):
        parse("gguf-q4_0-nonsense")


@pytest.mark.parametrize("spec", ["gguf-q4_0", "gguf-q4_1", "gguf-q8_0"])
def test_gradients_pass(spec):
    x = values(torch.float32).requires_grad_()
    weights = torch.randn_like(x)
    (parse(spec)(x) * weights).sum().backward()
    assert torch.equal(x.grad, weights)


def test_ternary_from_our_codes_is_kept_by_their_quantizer():
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(1))
    ours = parse("gguf-tq2_0")(x)
    for kind in ("TQ1_0", "TQ2_0"):
        assert torch.equal(theirs(ours.detach(), kind), ours)


def test_ties_away_from_zero():
    x = torch.tensor([-2.5, -0.5, 0.5, 0.49999997, 1.5, 8388607.5])
    expected = np.sign(x.numpy()) * np.floor(np.abs(x.numpy().astype(np.float64)) + 0.5)
    assert HalfAway().round(x, None).tolist() == expected.tolist()
