"""Gradients against plain autograd (the detach trick), the formulas of the papers, and what is saved for backward."""

import numpy as np
import pytest
import torch
from torch import Tensor

from qlightning.numerics import (
    LSQ,
    NF4,
    STE,
    Binary,
    ClippedSTE,
    Float,
    Format,
    Int,
    Learned,
    Levels,
    LSQStep,
    NoGradient,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    Quantizer,
    Ternary,
    UInt,
    parse,
)

GRANULARITIES = [PerTensor(), PerChannel(), PerGroup(4), PerBlock(3, 4)]
SYMMETRIC = [Int(4), Int(3, range="narrow"), UInt(4), Float(2, 1), Float(4, 3), Ternary(), Binary(), Levels(NF4)]


def damped(parameter: Tensor, factor: float) -> Tensor:
    """The parameter itself, its gradient multiplied by a factor."""
    return parameter * factor + (parameter - parameter * factor).detach()


def reference(x: Tensor, step: Tensor, lower: Tensor | None, format: Format, clipped: bool) -> Tensor:
    """Fake quantization of blocks, written with autograd and nothing of ours but the rounding to values."""
    zero = None if lower is None else format.low - lower / step
    if zero is not None:
        zero = zero + (zero.round().clamp(format.low, format.high) - zero).detach()
    v = x / step if zero is None else x / step + zero
    inside = v.clamp(format.low, format.high) if clipped else v
    q = inside + (format.snap(v.detach().clone(), torch.round) - inside).detach()
    return q * step if zero is None else (q - zero) * step


def learned(format: Format, granularity, gradient, x: Tensor) -> Quantizer:
    """A quantizer whose learned step is too small, so that many values saturate."""
    quantizer = Quantizer(format, granularity, scale=Learned(), gradient=gradient)
    quantizer.build(tuple(x.shape))
    quantizer.initialize(x.detach())
    with torch.no_grad():
        quantizer.scale.value *= 0.4
    return quantizer


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("gradient", [STE(), ClippedSTE(), LSQ(), LSQ(factor=0.3)], ids=repr)
@pytest.mark.parametrize("format", SYMMETRIC, ids=lambda format: repr(format)[:24])
def test_symmetric_gradients_equal_autograd(format, gradient, granularity):
    torch.manual_seed(0)
    x = torch.randn(6, 8, requires_grad=True)
    seen = torch.randn(6, 8)
    quantizer = learned(format, granularity, gradient, x)
    y = quantizer(x)
    y.backward(seen)

    x_ref = x.detach().clone().requires_grad_()
    step = quantizer.scale.value.detach().clone().requires_grad_()
    blocks = granularity.view(x_ref)
    count = blocks.shape[-1] * max(format.high, 1.0)
    factor = {STE(): 1.0, ClippedSTE(): 1.0, LSQ(): count**-0.5, LSQ(factor=0.3): 0.3}[gradient]
    expected = granularity.unview(reference(blocks, damped(step, factor), None, format, gradient != STE()), x.shape)
    expected.backward(seen)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, x_ref.grad)
    torch.testing.assert_close(quantizer.scale.value.grad, step.grad, rtol=1e-4, atol=1e-4)
    assert bool((x.grad == 0).any()) == (gradient != STE()), "the case must saturate"


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("gradient", [STE(), ClippedSTE(), LSQ()], ids=repr)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_asymmetric_gradients_equal_autograd(bits, gradient, granularity):
    """LSQ+: step and offset are learned; the zero point is rounded to an integer, straight-through."""
    torch.manual_seed(1)
    x = (torch.randn(6, 8) + 0.7).requires_grad_()
    seen = torch.randn(6, 8)
    format = Int(bits, symmetric=False)
    quantizer = learned(format, granularity, gradient, x)
    with torch.no_grad():
        quantizer.scale.lower *= 0.5
    y = quantizer(x)
    y.backward(seen)

    x_ref = x.detach().clone().requires_grad_()
    step = quantizer.scale.value.detach().clone().requires_grad_()
    lower = quantizer.scale.lower.detach().clone().requires_grad_()
    blocks = granularity.view(x_ref)
    factor = (blocks.shape[-1] * max(format.high, 1.0)) ** -0.5 if gradient == LSQ() else 1.0
    expected = reference(blocks, damped(step, factor), damped(lower, factor), format, gradient != STE())
    expected = granularity.unview(expected, x.shape)
    expected.backward(seen)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, x_ref.grad)
    torch.testing.assert_close(quantizer.scale.value.grad, step.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quantizer.scale.lower.grad, lower.grad, rtol=1e-4, atol=1e-4)
    assert bool((quantizer.scale.lower.grad != 0).any()) == (gradient != STE())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lsq_is_the_papers_equations_2_to_5(bits):
    """ds = -v + rint(v) inside, -Qn below, Qp above; dx = 1 inside, 0 outside; damped by 1 / sqrt(N Qp)."""
    rng = np.random.default_rng(bits)
    x64, seen = rng.standard_normal(500) * 3, rng.standard_normal(500)
    qn, qp, s = 2 ** (bits - 1), 2 ** (bits - 1) - 1, 0.25
    quantizer = parse(f"int{bits}-tensor-lsq")
    x = torch.tensor(x64, dtype=torch.float32).requires_grad_()
    quantizer.build((500,))
    quantizer.initialize(x.detach())
    torch.testing.assert_close(quantizer.scale.value.item(), 2 * np.abs(x64).mean() / np.sqrt(qp), rtol=1e-5, atol=0)
    with torch.no_grad():
        quantizer.scale.value.fill_(s)
    quantizer(x).backward(torch.tensor(seen, dtype=torch.float32))
    v = x.detach().double().numpy() / s
    ds = np.where(v <= -qn, -qn, np.where(v >= qp, qp, np.rint(v) - v))
    torch.testing.assert_close(
        quantizer.scale.value.grad.item(), (seen * ds).sum() / np.sqrt(500 * qp), rtol=1e-4, atol=0
    )
    dx = np.where((v >= -qn) & (v <= qp), seen, 0)
    np.testing.assert_allclose(x.grad.numpy(), dx, rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_plus_is_the_papers_equations(bits):
    """Codes count from 0, b is the offset: ds = rint(v) - v inside, 0 at the bottom, Qp on top; db = 1 where clipped.

    The paper's offset is real. Ours is rounded so that zero has a code: here it lies on the grid and the two agree.
    """
    rng = np.random.default_rng(bits)
    seen = rng.standard_normal(500)
    levels, s, b = 2**bits - 1, 0.25, -0.5
    quantizer = Quantizer(Int(bits, symmetric=False), scale=Learned(), gradient=LSQ(factor=1.0))
    x = torch.tensor(rng.standard_normal(500) * 3, dtype=torch.float32).requires_grad_()
    quantizer.build((500,))
    quantizer.initialize(x.detach())
    with torch.no_grad():
        quantizer.scale.value.fill_(s)
        quantizer.scale.lower.fill_(b)
    y = quantizer(x)
    y.backward(torch.tensor(seen, dtype=torch.float32))
    v = (x.detach().double().numpy() - b) / s
    below, above = v < 0, v > levels
    np.testing.assert_allclose(y.detach().numpy(), np.rint(v.clip(0, levels)) * s + b)
    ds = np.where(below, 0, np.where(above, levels, np.rint(v) - v))
    torch.testing.assert_close(quantizer.scale.value.grad.item(), (seen * ds).sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quantizer.scale.lower.grad.item(), seen[below | above].sum(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(x.grad.numpy(), np.where(below | above, 0, seen), rtol=1e-6)


def test_a_negative_step_acts_by_its_magnitude():
    x = torch.randn(4, 8)
    quantizer = learned(Int(4), PerTensor(), LSQ(), x)
    y = quantizer(x)
    y.sum().backward()
    plus = quantizer.scale.value.grad.clone()
    with torch.no_grad():
        quantizer.scale.value.neg_()
    quantizer.scale.value.grad = None
    assert torch.equal(quantizer(x), y)
    quantizer(x).sum().backward()
    assert torch.equal(quantizer.scale.value.grad, -plus)


def test_the_edge_of_the_range():
    v = torch.tensor([-8.6, -8.5, -8.4, -8.0, 0.0, 7.0, 7.4, 7.5, 7.6])
    q = Int(4).snap(v.clone(), torch.round)
    assert ClippedSTE().slope(v, q, Int(4)).tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert ClippedSTE(edge="code").slope(v, q, Int(4)).tolist() == [0, 1, 1, 1, 1, 1, 1, 0, 0]
    narrow = Int(4, range="narrow")
    v = torch.tensor([-7.6, -7.5, -7.4, 7.4, 7.5])
    assert ClippedSTE(edge="code").slope(v, q, narrow).tolist() == [0, 0, 1, 1, 0], "-7.5 rounds to -8"


def test_no_gradient_freezes_x_and_still_teaches_the_scale():
    x = torch.randn(4, 8, requires_grad=True)
    quantizer = learned(Int(4), PerChannel(), NoGradient(), x)
    y = quantizer(x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    torch.testing.assert_close(
        quantizer.scale.value.grad, (y.detach() / quantizer.scale.value).sum(-1, keepdim=True).detach()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("spec", ["int4-g4", "int4-g4-clip", "int4-lsq", "int4-asym-lsq", "nvfp4-g4", "mxfp4-g4-clip"])
def test_gradients_have_the_dtype_of_what_they_belong_to(spec, dtype):
    x = torch.randn(6, 8, dtype=dtype, requires_grad=True)
    quantizer = parse(spec)
    quantizer.build((6, 8))
    quantizer.initialize(x.detach())
    quantizer(x).float().square().sum().backward()
    assert x.grad.dtype == dtype
    assert bool(x.grad.isfinite().all())
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.any()) for p in quantizer.parameters())


def saved_bytes(act) -> dict[int, int]:
    """Storages that autograd keeps for backward while `act` runs: address -> bytes."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        act.keep = act()
    return kept


@pytest.mark.parametrize("spec", ["int4-g64", "nvfp4", "mxfp4", "int8-token", "int4-asym-g64", "int4-lsq", "int8-clip"])
def test_no_copy_of_x_is_saved_for_backward(spec):
    x = torch.randn(64, 512, requires_grad=True)
    quantizer = parse(spec)
    quantizer.build((64, 512))
    quantizer.initialize(x.detach())
    act = lambda: quantizer(x)  # noqa: E731
    kept = saved_bytes(act)
    if quantizer.needs_input:
        assert kept.pop(x.untyped_storage().data_ptr()) == x.nbytes
    assert sum(kept.values()) <= x.nbytes / 10
    assert x.untyped_storage().data_ptr() not in kept, "the identity needs no input"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClippedSTE(edge="step"), "write edge='value' or edge='code'"),
        (lambda: LSQ(factor=0), "write factor='count' or a positive number"),
        (lambda: LSQ(factor="size"), "write factor='count' or a positive number"),
    ],
)
def test_impossible_rules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_lsqs_own_initial_step():
    assert parse("int4-lsq").scale == Learned(LSQStep())
