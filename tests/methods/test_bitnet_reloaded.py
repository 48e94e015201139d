"""BitLinear against the paper's steps, written out; training and deployment are the contract's."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlightning import convert
from qlightning.methods import BitNetReloaded
from qlightning.numerics import Quantizer


def scheme(**options: Any) -> Any:
    return BitNetReloaded(**options).quantization()["rules"]["*"]


def layer(features: int = 32, out: int = 6, **options: Any) -> nn.Module:
    net = nn.Sequential(nn.Linear(features, out))
    convert(net, scheme(**options))
    return net[0]


def codes(w: Tensor, **options: Any) -> Tensor:
    return scheme(**options).weight.quantize(w).codes


@pytest.mark.parametrize("measure", ["median", "mean"])
@pytest.mark.parametrize("norm", ["layer", "none"])
def test_the_layer_is_the_papers_steps(measure: str, norm: str) -> None:
    linear, x = layer(measure=measure, norm=norm), 3 * torch.randn(5, 32) + 1
    w, bias = linear.weight.detach(), linear.bias
    x_n = F.layer_norm(x, (32,)) if norm == "layer" else x
    a = 128 / x_n.abs().amax(1, keepdim=True)
    x_q = torch.round(a * x_n).clamp(-128, 127)
    c = 1 / (w.abs().flatten().median() if measure == "median" else w.abs().mean())
    w_q = torch.round(c * w).clamp(-1, 1)
    assert torch.allclose(linear(x), x_q @ w_q.t() / (c * a) + bias, atol=1e-4)


@pytest.mark.parametrize("measure", ["median", "mean"])
def test_codes_are_ternary_and_scale_with_the_weight(measure: str) -> None:
    w = torch.randn(16, 33)
    assert set(codes(w, measure=measure).flatten().tolist()) == {-1, 0, 1}
    quantizer: Quantizer = scheme(measure=measure).weight
    for k in (0.125, 3.0, 700.0):
        assert torch.allclose(quantizer(k * w), k * quantizer(w), rtol=1e-6)
        assert torch.equal(codes(k * w, measure=measure), codes(w, measure=measure))


@pytest.mark.parametrize(("measure", "share"), [("mean", 0.31), ("median", 0.26)])
def test_the_share_of_zeros_on_a_gaussian(measure: str, share: float) -> None:
    w = torch.randn(400, 1000, generator=torch.Generator().manual_seed(0))
    assert (codes(w, measure=measure) == 0).float().mean().item() == pytest.approx(share, abs=0.006)


def test_the_median_of_an_even_number_is_the_lower_one() -> None:
    w = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    assert scheme().weight.quantize(w).scale.item() == 2.0


def test_the_gradient_of_the_weight_has_no_mask() -> None:
    """dL/dW through W_q = Q(cW) / c with slope 1 everywhere: what the multiplied weight gets, saturated or not."""
    linear, x = layer(norm="none", input_bits=None), torch.randn(5, 32)
    w = linear.weight
    grad = torch.randn(5, 6)
    (found,) = torch.autograd.grad(linear(x), w, grad)
    c = 1 / w.detach().abs().flatten().median()
    assert float(((c * w).abs() > 1.5).float().mean()) > 0.1
    with_codes = grad.t() @ x / c  # dL/dW_q of y = x W_q' / c
    assert torch.allclose(found, c * with_codes, atol=1e-4)


def test_the_gradient_of_the_input_passes_a_saturated_maximum() -> None:
    linear, x = layer(norm="none"), torch.randn(5, 32).abs().requires_grad_()
    grad = torch.randn(5, 6)
    (found,) = torch.autograd.grad(linear(x), x, grad)
    assert torch.allclose(found, grad @ scheme().weight(linear.weight).detach(), atol=1e-5)


@pytest.mark.parametrize(("largest", "code"), [(128, 127), (127, 127)])
def test_both_conventions_of_the_largest_code(largest: int, code: int) -> None:
    quantizer: Quantizer = scheme(largest=largest).input
    x = torch.tensor([[1.0, -0.5], [-1.0, 0.5]])
    stored = quantizer.quantize(x)
    assert stored.codes[:, 0].tolist() == [code, -largest]
    assert torch.allclose(stored.scale, torch.full((2, 1), 1 / largest))
    assert torch.equal(quantizer(x)[:, 0] == x[:, 0], torch.tensor([largest == 127, True]))


def test_stochastic_ternary_rounding_follows_the_magnitude() -> None:
    """sign(u) where |u| is at least a uniform number: u on average inside [-1, 1], sign(u) outside."""
    quantizer: Quantizer = scheme(rounding="stochastic", measure="mean").weight
    u = torch.cat([torch.full((40000,), 0.3), torch.full((40000,), -0.8), torch.full((40000,), 1.9)])
    u = torch.cat([u, -u])
    scale = u.abs().mean()
    quantizer.train()
    q = quantizer(u[None] * 1.0) / scale
    v = u / scale
    for value in (0.3, -0.8):
        chosen = q[0][u == value].mean().item()
        assert chosen == pytest.approx(value / scale.item(), abs=0.012)
    torch.testing.assert_close(q[0][v > 1], torch.ones_like(q[0][v > 1]))  # torch's own mean is another one
    quantizer.eval()
    assert torch.equal(quantizer(u[None]), scheme(measure="mean").weight(u[None]))


def test_embeddings_and_heads_stay_in_float_by_default() -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.proj, self.lm_head = nn.Embedding(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)

    coverage = convert(Tiny(), {"*": scheme()})
    assert {row.name for row in coverage.rows if row.placements} == {"proj"}


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="measure='median' or measure='mean'"):
        BitNetReloaded(measure="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="127 or 128"):
        BitNetReloaded(largest=100)  # type: ignore[arg-type]
