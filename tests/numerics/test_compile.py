"""torch.compile(fullgraph=True) of forward and backward computes the same bits as eager."""

import functools

import pytest
import torch

from qlightning.numerics import parse

# torch.compile builds an instance of the autograd function it traces and is warned by torch for it
compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@functools.cache
def compiled(spec: str):
    torch._dynamo.reset()
    quantizer = parse(spec)
    quantizer.build((4, 32))
    quantizer.initialize(torch.randn(4, 32, generator=torch.Generator().manual_seed(1)))
    return quantizer, torch.compile(quantizer, fullgraph=True, backend="aot_eager")


@compiles
@pytest.mark.parametrize(
    "spec",
    ["int4-g16", "int8-asym-token", "nvfp4", "mxfp4", "int4-asym-g16-lsq", "nf4-g16-clip", "int4-g16-sr"],
)
def test_compiled_without_graph_breaks_it_computes_the_same(spec):
    quantizer, fast = compiled(spec)
    results = []
    for act in (quantizer, fast):
        quantizer.zero_grad()
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = act(x)
        (y * torch.linspace(-1, 1, 32)).sum().backward()
        results.append([y.detach(), x.grad, *(p.grad.clone() for p in quantizer.parameters())])
    for eager, graph in zip(*results, strict=True):
        assert torch.equal(eager, graph)


@compiles
def test_compiled_moving_average_moves_as_in_eager():
    quantizer, fast = compiled("int8-tensor-ema")
    x = torch.randn(4, 32)
    start = quantizer.scale.value.clone()
    eager = quantizer.train()(x)
    moved = quantizer.scale.value.clone()
    quantizer.scale.value.copy_(start)
    assert torch.equal(fast(x), eager)
    assert torch.equal(quantizer.scale.value, moved)
    assert not torch.equal(start, moved)


@compiles
def test_compiled_bypass_breaks_no_graph():
    quantizer = parse("int4-asym-lsq")
    quantizer.build((4, 32))
    quantizer.enabled = False
    x = torch.randn(4, 32, requires_grad=True)
    y = torch.compile(quantizer, fullgraph=True, backend="aot_eager")(x)
    y.square().sum().backward()
    assert torch.equal(y, x)
    assert torch.equal(x.grad, 2 * x)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in quantizer.learned())
