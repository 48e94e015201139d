"""The checks of the TDQ card (S11)."""

import pytest
import torch
from torch import Tensor, nn

from qlightning import Scheme, convert
from qlightning.methods import TDQ
from qlightning.methods.tdq import SILU_MINIMUM, TimeMLP, embedding, tables
from qlightning.numerics import ClippedSTE, Int, PerTensor, Quantizer
from qlightning.numerics.conditioned import publish
from qlightning.numerics.per_sample import PerSample


class Denoiser(nn.Module):
    """A linear layer behind a SiLU and one before it, told a time step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.second(nn.functional.silu(self.first(x)))


def trained() -> Denoiser:
    """A converted model with settled and then disturbed networks, as if trained."""
    model = Denoiser()
    convert(model, TDQ(silu=["second"]).quantization()["rules"])
    for layer in (model.first, model.second):
        layer.input_quantizer.initialize(torch.randn(4, 16 if layer is model.second else 8))
        with torch.no_grad():
            for p in layer.input_quantizer.learned():
                p += 0.05 * torch.randn_like(p)
    return model


def settled(**options: float) -> Quantizer:
    scale = TimeMLP(features=16, **options)
    quantizer = Quantizer(Int(4, range="narrow"), PerSample(), scale=scale, gradient=ClippedSTE())
    quantizer.build((-1, 8))
    quantizer.initialize(torch.randn(5, 8))
    return quantizer


def test_the_step_is_the_calibrated_one_for_every_time_step_at_first() -> None:
    x = torch.randn(5, 32)
    quantizer = Quantizer(Int(4, range="narrow"), PerSample(), scale=TimeMLP(features=16)).train()
    quantizer.build((-1, 32))
    quantizer.initialize(x)
    expected = ((x.mean(1).abs() + 3 * x.std(1)) / 7).mean()
    steps = quantizer.scale.step_at(torch.arange(0, 1000, 37))
    assert torch.allclose(steps, expected.expand_as(steps), rtol=1e-5)


def test_steps_are_positive_whatever_the_network_has_learned() -> None:
    quantizer = settled().eval()
    with torch.no_grad():
        for p in quantizer.learned():
            p.normal_(0, 3)
    assert bool((quantizer.scale.step_at(torch.arange(1000)) > 0).all())


def test_each_sample_has_the_step_of_its_time_step() -> None:
    quantizer = settled().eval()
    with torch.no_grad():
        for p in quantizer.learned():
            p += torch.randn_like(p) * 0.1
    x, t = torch.randn(3, 8), torch.tensor([0, 500, 999])
    publish(quantizer, t)
    together = quantizer(x)
    for i in range(3):
        publish(quantizer, t[i])
        assert torch.equal(quantizer(x[i : i + 1]), together[i : i + 1])
        s = quantizer.scale.step_at(t[i : i + 1])
        assert torch.allclose(together[i], s[0] * torch.clamp(torch.round(x[i] / s[0]), -7, 7), atol=1e-6)


def test_gradients_reach_the_network_through_division_and_product() -> None:
    """Against autograd of s * round(clip(x / s)) with straight-through rounding."""
    quantizer = settled(dropout=0.0)
    x, grad = torch.randn(3, 8), torch.randn(3, 8)
    publish(quantizer, torch.tensor([3, 400, 990]))
    got = torch.autograd.grad(quantizer(x), list(quantizer.learned()), grad)
    s = quantizer.scale.step_at(torch.tensor([3, 400, 990]))
    u = (x / s).clamp(-7, 7)
    y = s * (u + (torch.round(u) - u).detach())
    for ours, reference in zip(got, torch.autograd.grad(y, list(quantizer.learned()), grad), strict=True):
        assert torch.allclose(ours, reference, atol=1e-4)


def test_a_silu_output_has_its_minimum_as_lowest_code() -> None:
    model = trained().eval()
    quantizer = model.second.input_quantizer
    publish(model, 10)
    x = torch.nn.functional.silu(torch.linspace(-6, 2, 64)).view(1, 64)
    values = quantizer(x)
    assert values.min().item() == pytest.approx(SILU_MINIMUM, abs=1e-4)
    s = quantizer.scale.step_at(torch.tensor([10]))
    expected = s * torch.clamp(torch.round((x - SILU_MINIMUM) / s), 0, 15) + SILU_MINIMUM
    assert torch.allclose(values, expected, atol=1e-5)


def test_a_table_is_bit_equal_to_the_networks_at_every_step_of_the_sampler() -> None:
    model = trained().eval()
    x, schedule = torch.randn(4, 8), list(range(0, 1000, 50))
    before = [model(x, torch.tensor(t)) for t in schedule]
    assert tables(model, schedule) == 2
    for t, expected in zip(schedule, before, strict=True):
        assert torch.equal(model(x, torch.tensor(t)), expected)
    assert not any(isinstance(child, TimeMLP) for child in model.modules())


def test_a_table_refuses_a_time_step_it_has_no_scale_for() -> None:
    model = trained()
    tables(model, [0, 100])
    with pytest.raises(ValueError, match="no scale for time steps"):
        model(torch.randn(2, 8), torch.tensor(50))


def test_only_a_trained_model_has_tables() -> None:
    with pytest.raises(ValueError, match="TDQ"):
        tables(Denoiser(), [0])


def test_a_model_with_tables_describes_itself() -> None:
    from qlightning.layers.swap import convert_like

    model, other = trained(), Denoiser()
    tables(model, [0, 100])
    convert_like(other, model.state_dict())
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 8)
    assert torch.equal(other.eval()(x, torch.tensor(100)), model.eval()(x, torch.tensor(100)))


def test_embeddings_are_those_of_diffusers() -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0, 7, 999])
    assert torch.allclose(
        embedding(t, 32), get_timestep_embedding(t, 32, flip_sin_to_cos=True, downscale_freq_shift=0), atol=1e-4
    )


def test_a_scale_per_tensor_cannot_be_conditioned_on_samples() -> None:
    model = Denoiser()
    convert(model, Scheme("int8", input=Quantizer(Int(4), PerTensor(), scale=TimeMLP())))
    model.first.input_quantizer.initialize(torch.randn(2, 8))
    with pytest.raises(ValueError, match="time steps were published"):
        model(torch.randn(2, 8), torch.tensor([1, 2]))
