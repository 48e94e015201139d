"""The clips' gradients against the paper's and finite differences; what is penalised; training is the contract's."""

import pytest
import torch
from torch import Tensor

from qlightning.losses.taps import sites
from qlightning.methods import ActivationRegularization
from qlightning.methods.activation_regularization import Deviations
from qlightning.numerics import Int
from qlightning.tasks import CausalLM

LEVELS = 15


def written_out(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    s = LEVELS / (high - low)
    return torch.round(s * (x.clamp(low, high) - low)) / s + low


def clip_gradients(x: Tensor, g: Tensor, low: float, high: float) -> tuple[Tensor, float, float]:
    """The paper's: dx, dc+ and dc-."""
    u = LEVELS / (high - low) * (x - low)
    e = (torch.round(u) - u) / LEVELS
    inside, above, below = (x >= low) & (x <= high), x > high, x < low
    return g * inside, float((g * (above + e * inside)).sum()), float((g * (below.to(x.dtype) - e * inside)).sum())


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(4, 50, generator=generator, dtype=torch.float64) + 0.3
    return x, torch.randn(4, 50, generator=generator, dtype=torch.float64)


def test_the_papers_gradients_are_differences_with_the_rounding_held() -> None:
    x, g = data()
    low, high, h = -1.7, 2.9, 1e-5

    def held(low_: float, high_: float) -> float:
        """Rounding adds what it adds at (low, high), in units of the step."""
        u = LEVELS / (high - low) * (x - low)
        residual = torch.round(u) - u
        y = torch.where(x > high, high_, torch.where(x < low, low_, x + residual * (high_ - low_) / LEVELS))
        return float((g * y).sum())

    _, upper, lower = clip_gradients(x, g, low, high)
    assert upper == pytest.approx((held(low, high + h) - held(low, high - h)) / (2 * h), abs=1e-9)
    assert lower == pytest.approx((held(low + h, high) - held(low - h, high)) / (2 * h), abs=1e-9)


@pytest.mark.parametrize(("low", "high"), [(-1.7, 2.9), (0.4, 3.0), (-3.0, -0.5)])
def test_the_quantizer_is_the_papers(low: float, high: float) -> None:
    """Values, and the gradients of x and of both clips, which step and offset give by the chain rule."""
    quantizer = ActivationRegularization().quantization()["input"]
    quantizer.build((-1, 50))
    quantizer.initialize(torch.ones(2, 50))
    format, scale = quantizer.format, quantizer.scale
    clips = torch.tensor([low, high], dtype=torch.float64, requires_grad=True)
    step = (clips[1] - clips[0]) / LEVELS
    offset = clips[0] - format.low * step
    with torch.no_grad():
        scale.value.fill_(step.item())
        scale.lower.fill_(offset.item())
    x, g = data()
    wide = x.float().requires_grad_()
    y = quantizer(wide)
    expected = written_out(x, *clips.detach())
    near = (LEVELS / (high - low) * (x - low) % 1 - 0.5).abs() < 1e-4  # ties in another precision
    assert torch.allclose(y.detach().double()[~near], expected[~near], atol=1e-5)
    y.backward(g.float())
    (through,) = torch.autograd.grad(
        step * scale.value.grad.double().sum() + offset * scale.lower.grad.double().sum(), clips
    )
    dx, upper, lower = clip_gradients(x, g, low, high)
    assert torch.allclose(wide.grad.double(), dx, atol=1e-6)
    assert through.tolist() == pytest.approx([lower, upper], abs=2e-4)


def test_many_bits_are_a_clamp() -> None:
    quantizer = ActivationRegularization(bits=16, clips=1.5).quantization()["input"]
    x = data()[0].float()
    quantizer.build((-1, 50))
    quantizer.initialize(x)
    reach, mean = 1.5 * x.std(correction=0), x.mean()
    assert torch.allclose(quantizer(x), x.clamp(mean - reach, mean + reach), atol=2e-4)


@pytest.mark.parametrize("zero", ["real", "integer"])
def test_zero_is_on_the_grid_if_wished(zero: str) -> None:
    quantizer = ActivationRegularization(zero=zero).quantization()["input"]  # type: ignore[arg-type]
    quantizer.build((-1, 50))
    quantizer.initialize(data()[0].float())
    assert bool(quantizer(torch.zeros(1, 50)).any()) == (zero == "real")


def test_where_clips_start() -> None:
    x = torch.cat([data()[0].float().flatten(), torch.tensor([40.0])])[None]
    step, lower = Deviations(3.0).measure(x, Int(4, symmetric=False))
    mean, std = x.mean(), x.std(correction=0)
    assert lower is not None
    assert float(lower) == pytest.approx(max(float(mean - 3 * std), float(x.min())), rel=1e-5)
    assert float(lower + 15 * step) == pytest.approx(float(mean + 3 * std), rel=1e-5)
    step, lower = Deviations(100.0).measure(x, Int(4, symmetric=False))
    assert lower is not None
    assert (float(lower), float(lower + 15 * step)) == pytest.approx((float(x.min()), 40.0), rel=1e-5)


def test_every_projection_is_penalised_and_the_head_is_not() -> None:
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    task = CausalLM({**config, "num_attention_heads": 2, "vocab_size": 13})
    task.configure_model()
    (penalty,) = ActivationRegularization().extras()
    found = [site.name for pattern in penalty.targets for site in sites(task, pattern)]  # type: ignore[attr-defined]
    assert len(found) == 14
    assert not any("head" in name for name in found)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"Deviations\(4.0\)"):
        ActivationRegularization(clips=0.0)
