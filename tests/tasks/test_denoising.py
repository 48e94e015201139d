"""The identities of DDPM, against diffusers' scheduler and the published formulas."""

import pytest
import torch

from qlightning.tasks.denoising import Denoising

PREDICTIONS = ["epsilon", "v_prediction"]


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((6, 1, 4, 4), generator=generator) * 2 - 1
    return image, torch.randn(image.shape, generator=generator), torch.tensor([0, 10, 300, 500, 900, 999])


def level(process, step):
    """The share of signal variance that is left: the cumulated product of one minus a linear beta."""
    beta = torch.linspace(1e-4, 0.02, process.timesteps, dtype=torch.float64)
    return (1 - beta).cumprod(0)[step].view(-1, 1, 1, 1)


def test_targets_equal_the_formulas(drawn):
    image, noise, step = drawn
    process = Denoising("v_prediction", "linear", 1000)
    a = level(process, step)
    velocity = a.sqrt() * noise - (1 - a).sqrt() * image
    torch.testing.assert_close(process.target(image, noise, step).double(), velocity, atol=1e-5, rtol=1e-5)
    assert torch.equal(process.target(image, noise, step), process.scheduler.get_velocity(image, noise, step))
    assert Denoising("epsilon", "linear", 1000).target(image, noise, step) is noise


def test_the_model_sees_the_noisy_image_of_the_formula(drawn):
    image, noise, step = drawn
    process = Denoising("epsilon", "linear", 1000)
    seen = []
    process.errors(lambda x, t: seen.append((x, t)) or x, image, noise, step)
    a = level(process, step)
    torch.testing.assert_close(seen[0][0].double(), a.sqrt() * image + (1 - a).sqrt() * noise, atol=1e-5, rtol=1e-5)
    assert torch.equal(seen[0][0], process.scheduler.add_noise(image, noise, step))
    assert torch.equal(seen[0][1], step)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_model_has_no_error(drawn, prediction):
    image, noise, step = drawn
    process = Denoising(prediction, "squaredcos_cap_v2", 1000)
    for error in process.errors(lambda x, t: process.target(image, noise, step), image, noise, step):
        assert torch.equal(error, torch.zeros(6))


def test_the_noise_error_of_a_velocity_is_that_of_the_noise_it_implies(drawn):
    image, noise, step = drawn
    process = Denoising("v_prediction", "linear", 1000)
    wrong = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    error, eps_error = process.errors(lambda x, t: wrong, image, noise, step)
    a = level(process, step)
    noisy = a.sqrt() * image + (1 - a).sqrt() * noise
    implied = a.sqrt() * wrong + (1 - a).sqrt() * noisy
    torch.testing.assert_close(eps_error.double(), (implied - noise).square().mean((1, 2, 3)), atol=1e-5, rtol=1e-4)
    velocity = process.scheduler.get_velocity(image, noise, step)
    torch.testing.assert_close(error, (wrong - velocity).square().mean((1, 2, 3)))


def test_held_out_noise_depends_on_the_index_only():
    process, image = Denoising("epsilon", "linear", 1000), torch.zeros(8, 1, 4, 4)
    torch.manual_seed(0)
    noise, step = process.held_out(image, 3)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    again, step_again = process.held_out(image + 1, 3)
    assert torch.equal(noise, again)
    assert torch.equal(step, step_again)
    assert not torch.equal(noise, process.held_out(image, 4)[0])
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert step.div(125, rounding_mode="floor").tolist() == list(range(8))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_sampling_with_the_true_denoiser_gives_the_image_back(prediction):
    # the only image of the world is known, so the exact noise and velocity are known at every step
    process = Denoising(prediction, "squaredcos_cap_v2", 200)
    image = torch.linspace(-0.9, 0.9, 16).view(1, 1, 4, 4)

    def exact(noisy, step):
        a = process.scheduler.alphas_cumprod[step].view(-1, 1, 1, 1)
        noise = (noisy - a.sqrt() * image) / (1 - a).sqrt()
        return process.target(image.expand_as(noisy), noise, step)

    generator = torch.Generator().manual_seed(0)
    start = torch.randn((3, 1, 4, 4), generator=generator)
    drawn = process.sample(exact, start, steps=20, generator=generator)
    torch.testing.assert_close(drawn, image.expand(3, 1, 4, 4), atol=2e-3, rtol=0)
