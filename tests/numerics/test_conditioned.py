"""Step tables: the row of a time step, its gradient, and what happens without one."""

import copy

import pytest
import torch
from torch import Tensor

from qlightning.numerics import MSE, ClippedSTE, Int, PerTensor, Quantizer
from qlightning.numerics.conditioned import StepTable, publish
from qlightning.numerics.per_sample import PerSample
from qlightning.numerics.spec import describe, rebuild


def table(rows: int = 10, *, symmetric: bool = True, x: Tensor | None = None) -> Quantizer:
    scale = StepTable(rows, timesteps=100, source=MSE(power=2.4))
    quantizer = Quantizer(Int(4, symmetric=symmetric), PerSample(), scale=scale, gradient=ClippedSTE())
    quantizer.build((-1, 16))
    quantizer.initialize(torch.randn(4, 16) if x is None else x)
    return quantizer


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [10, 100])
def test_every_step_of_a_sampler_has_a_row_of_its_own(spacing: str, steps: int) -> None:
    from diffusers import DDIMScheduler

    sampler = DDIMScheduler(num_train_timesteps=1000, timestep_spacing=spacing)
    sampler.set_timesteps(steps)
    scale = StepTable(steps, timesteps=1000)
    scale.build((1, 1), Int(4))
    scale.context = sampler.timesteps
    assert scale.row(steps).tolist() == list(range(steps))[::-1]


def test_samples_with_their_own_time_steps_are_quantized_with_their_own_rows() -> None:
    quantizer, x = table(), torch.randn(3, 16)
    with torch.no_grad():
        quantizer.scale.value.copy_(torch.rand(10, 1) + 0.1)
    steps = torch.tensor([3, 47, 99])
    publish(quantizer, steps)
    together = quantizer(x)
    for i, row in enumerate((0, 4, 9)):
        publish(quantizer, int(steps[i]))
        assert torch.equal(quantizer(x[i : i + 1]), together[i : i + 1])
        step = quantizer.scale.value[row].item()
        assert torch.equal(together[i], (x[i] / step).round().clamp(-8, 7) * step)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_reach_the_row_in_use_and_no_other(symmetric: bool) -> None:
    """Against autograd of the formula x -> s (clamp(round(x / s + z)) - z), with no damping."""
    quantizer, x, grad = table(symmetric=symmetric), torch.randn(3, 16) * 2, torch.randn(3, 16)
    publish(quantizer, torch.tensor([5, 5, 61]))
    (quantizer(x) * grad).sum().backward()
    value = quantizer.scale.value.detach().requires_grad_()
    lower = None if symmetric else quantizer.scale.lower.detach().requires_grad_()
    rows = torch.tensor([0, 0, 6])
    s = value[rows]
    z = torch.zeros(()) if lower is None else -8 - lower[rows] / s
    z = z + (z.round().clamp(-8, 7) - z).detach()
    v = (x / s + z).clamp(-8, 7)
    (s * (v + (v.round() - v).detach() - z) * grad).sum().backward()
    assert torch.allclose(quantizer.scale.value.grad, value.grad, atol=1e-4)
    assert not quantizer.scale.value.grad[[1, 2, 3, 4, 5, 7, 8, 9]].any()
    if lower is not None:
        assert torch.allclose(quantizer.scale.lower.grad, lower.grad, atol=1e-4)


def test_all_rows_start_where_one_scale_for_everything_would() -> None:
    x = torch.randn(4, 16)
    quantizer = table(x=x)
    step, _ = MSE(power=2.4).measure(x.reshape(1, -1), Int(4))
    assert torch.equal(quantizer.scale.value, step.expand(10, 1))
    one = Quantizer(Int(4), PerTensor(), scale=MSE(power=2.4))
    publish(quantizer, 7)
    assert torch.equal(quantizer(x), one(x))


def test_processes_pool_what_they_observed() -> None:
    x = torch.randn(2, 4, 16)
    quantizer = table(x=x[0])
    one, other = table(x=x[0]).scale, table(x=x[1]).scale
    sums = iter([one.count + other.count, one.total_value + other.total_value])
    quantizer.scale.merge(lambda _: next(sums))
    quantizer.scale.settle()
    assert torch.allclose(quantizer.scale.value, (one.value + other.value) / 2)


def test_no_time_step_or_too_many_are_errors() -> None:
    quantizer = table()
    with pytest.raises(ValueError, match="told no time step"):
        quantizer(torch.randn(2, 16))
    publish(quantizer, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="batch of 2"):
        quantizer(torch.randn(2, 16))
    with pytest.raises(ValueError, match="StepTable"):
        StepTable(0)


def test_it_is_described_copied_and_loaded() -> None:
    quantizer, x = table(symmetric=False), torch.randn(2, 16)
    with torch.no_grad():
        quantizer.scale.value.mul_(torch.rand(10, 1) + 0.5)
    publish(quantizer, 35)
    other = rebuild(describe(quantizer))
    assert other == quantizer
    other.build((-1, 16))
    other.load_state_dict(quantizer.state_dict())
    publish(other, 35)
    assert torch.equal(other(x), quantizer(x))
    assert torch.equal(copy.deepcopy(quantizer)(x), quantizer(x))
