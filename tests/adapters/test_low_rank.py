"""Low-rank updates inside the quantizer, against autograd of the composed formula."""

import pytest
import torch
from torch import Tensor, nn

from qlightning.adapters import LowRank
from qlightning.layers.contraction import contract
from qlightning.layers.linear import _LINEAR
from qlightning.numerics import parse


def reference(x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor, spec: str | None) -> Tensor:
    effective = w + (b @ a) * 0.5
    return nn.functional.linear(x, effective if spec is None else parse(spec)(effective), bias)


@pytest.mark.parametrize("spec", [None, "int4-g8", "int4-g8-clip"])
@pytest.mark.parametrize("trained", [True, False])
def test_a_layer_with_an_adapter_is_the_composed_formula(spec: str | None, trained: bool) -> None:
    torch.manual_seed(0)
    x, w, a, b, bias = torch.randn(5, 16), torch.randn(6, 16), torch.randn(2, 16), torch.randn(6, 2), torch.randn(6)
    leaves = [t.double().float().requires_grad_() for t in (x, a, b, bias)]
    w.requires_grad_(trained)
    quantizer = None if spec is None else parse(spec)
    xs, aa, bb, bi = leaves
    y = contract(_LINEAR, xs, w, bi, None, quantizer, inside=LowRank([(aa, bb, 0.5)]))
    expected = reference(xs, w, aa, bb, bi, spec)
    assert torch.equal(y, expected)
    wanted = [*leaves, w] if trained else leaves
    grad = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_layer_with_an_adapter_keeps_no_weight_for_backward() -> None:
    x, w, a, b = torch.randn(4, 64), torch.randn(64, 64), torch.randn(2, 64), torch.zeros(64, 2)
    a.requires_grad_(), b.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        contract(_LINEAR, x, w, None, None, parse("int4-g32"), inside=LowRank([(a, b, 1.0)]))
    own = {t.data_ptr() for t in (x, w, a, b)}
    assert sum(t.numel() for t in saved if t.data_ptr() not in own) == 0


def test_the_effective_weight_is_what_a_merge_writes() -> None:
    w = torch.randn(6, 16).bfloat16()
    pairs = [(torch.randn(2, 16), torch.randn(6, 2), 0.5), (torch.randn(3, 16), torch.randn(6, 3), 2.0)]
    merged = w.clone()
    for a, b, scaling in pairs:
        merged += (b @ a) * scaling  # in float32, rounded once for each: so PEFT merges
    adapter = LowRank(pairs)
    assert torch.equal(adapter.effective(w, adapter.tensors()), merged)


def test_autocast_does_not_change_the_effective_weight() -> None:
    w, a, b = torch.randn(6, 16), torch.randn(2, 16), torch.randn(6, 2)
    adapter = LowRank([(a, b, 1.0)])
    plain = adapter.effective(w, adapter.tensors())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapter.effective(w, adapter.tensors()), plain)
