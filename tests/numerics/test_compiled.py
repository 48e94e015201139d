"""Compiled quantizers give the bits of eager ones: divisions, and roundings that a compiler would leave out."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from qlightning.layers.convert import convert
from qlightning.numerics import parse
from qlightning.numerics.compiled import rounded_by_bits
from qlightning.numerics.statistics import divide

ASKED = """
import os, sys
{before}
from torch import nn
from qlightning.layers.convert import convert
convert(nn.Sequential(nn.Linear(4, 4)), "int4")
import torch._inductor.config as config
print(config.eager_numerics.division_rounding)
"""


REFUSED = "os.environ['TORCHINDUCTOR_EMULATE_DIVISION_ROUNDING'] = '0'"


@pytest.mark.parametrize(
    ("before", "rounded"),
    [("", "True"), ("import torch._inductor.config", "True"), (REFUSED, "False")],
    ids=["before", "after", "refused"],
)
def test_a_converted_model_divides_exactly(before: str, rounded: str) -> None:
    call = [sys.executable, "-W", "ignore", "-c", ASKED.format(before=before)]
    assert subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip() == rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_by_bits_is_torchs_cast(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator, dtype=torch.int32)
    everything = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    ties = (everything[1:].double() + everything[:-1].double()).div(2).float()
    small = torch.randn(50_000, generator=generator) * 2.0**-14
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 65519.996, 65520.0, -65536.0, 1e-45, -0.0])
    x = torch.cat([bits.view(torch.float32), everything, ties, small, special])
    torch.testing.assert_close(rounded_by_bits(x, dtype), x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("by", [6.0, 7.5, 15.0, 127.5, 255.0, 448.0])
def test_a_quotient_in_float64_rounds_to_that_of_float32(by: float) -> None:
    x = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    for wide in (x.double() / by, x.double() * (1 / by)):  # a compiler may multiply by the reciprocal
        assert torch.equal(wide.float(), divide(x, by))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own code, which the compiler calls
def test_compiled_values_are_the_eager_ones() -> None:
    quantizers = [parse(spec) for spec in ("int4-g32", "int8-token", "fp8e4m3-token", "int4-asym-g32-sfp16")]

    def values(x: torch.Tensor) -> list[torch.Tensor]:
        return [tensor for q in quantizers for tensor in (q.values(x, q.grid(x), None), q.codes(x, q.grid(x), None))]

    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
        for one, other in zip(torch.compile(values, fullgraph=True)(x), values(x), strict=True):
            assert torch.equal(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="inductor divides exactly on a CPU; needs a GPU")
@pytest.mark.parametrize("spec", ["int4-g32", "int8-channel", "fp8e4m3-channel", "nvfp4"])
def test_compiled_values_are_the_eager_ones_on_a_gpu(spec: str) -> None:
    layer = convert(nn.Sequential(nn.Linear(1024, 2048, device="cuda")), spec)[0]
    quantizer, weight = layer.quantizer("weight"), layer.weight.detach()
    assert torch.equal(torch.compile(quantizer)(weight), quantizer(weight))
