"""CAGE against its equations: the check list of its card, and the plain optimizer where it must not act."""

import copy
import itertools
from functools import partial

import pytest
import torch
from torch import nn

from qlightning.layers.convert import convert
from qlightning.optim import Cage, pull_strength, weights_of

SGD = partial(torch.optim.SGD, lr=0.02)
ADAMW = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)


def make(spec="int4-channel-lsq", seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    convert(model, spec)
    return model


def train(model, optimizer, *, mode="decoupled", strength=0.0, steps=4, zero_gradient=False):
    """Returns the distances from the grid before every step and after the last."""
    cage, errors = Cage(mode), []
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        errors.append([weight.matrix() - weight.quantized() for weight in weights_of(model)])
        optimizer.zero_grad()
        loss = model(torch.randn(5, 8, generator=generator)).square().mean()
        (loss * (0.0 if zero_gradient else 1.0)).backward()
        cage.before(optimizer, weights_of(model), strength=strength)
        optimizer.step()
        cage.after(optimizer)
    errors.append([weight.matrix() - weight.quantized() for weight in weights_of(model)])
    return errors


@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
def test_without_a_gradient_the_distance_shrinks_by_lr_times_strength(mode):
    """e <- (1 - lr * strength) e for a fixed grid; every weight stays in its cell."""
    model = make()
    errors = train(model, SGD(model.parameters()), mode=mode, strength=10.0, steps=3, zero_gradient=True)
    for before, after in itertools.pairwise(errors):
        for e, shrunk in zip(before, after, strict=True):
            torch.testing.assert_close(shrunk, 0.8 * e, rtol=0, atol=3e-7)
    assert errors[0][0].abs().max() > 0.01


def test_adam_does_not_scale_the_decoupled_pull():
    model = make()
    errors = train(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0),
        strength=10.0,
        steps=1,
        zero_gradient=True,
    )
    for e, shrunk in zip(*errors, strict=True):
        torch.testing.assert_close(shrunk, 0.8 * e, rtol=0, atol=3e-7)


@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
def test_at_strength_0_it_is_the_plain_optimizer_bit_for_bit(mode):
    plain, caged = make(), make()
    optimizer = ADAMW(plain.parameters())
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        optimizer.zero_grad()
        plain(torch.randn(5, 8, generator=generator)).square().mean().backward()
        optimizer.step()
    train(caged, ADAMW(caged.parameters()), mode=mode, strength=0.0)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, caged.state_dict()[name]), name


def test_the_decoupled_pull_is_the_difference_of_one_step_and_adam_does_not_remember_it():
    model = make()
    plain = copy.deepcopy(model)
    e = [weight.matrix() - weight.quantized() for weight in weights_of(model)]
    ours, theirs = ADAMW(model.parameters()), ADAMW(plain.parameters())
    train(model, ours, strength=5.0, steps=1)
    train(plain, theirs, steps=1)
    for layer, error in zip((0, 2), e, strict=True):
        expected = plain[layer].weight - 0.02 * 5.0 * error
        torch.testing.assert_close(model[layer].weight, expected, rtol=0, atol=1e-7)
        assert torch.equal(model[layer].bias, plain[layer].bias)
        assert torch.equal(model[layer].weight_quantizer.scale.value, plain[layer].weight_quantizer.scale.value)
    for mine, other in zip(ours.state.values(), theirs.state.values(), strict=True):
        assert torch.equal(mine["exp_avg"], other["exp_avg"])
        assert torch.equal(mine["exp_avg_sq"], other["exp_avg_sq"])


@pytest.mark.parametrize("spec", ["int4-channel-lsq", "int3-g8"])
def test_for_sgd_both_modes_are_one(spec):
    ours, theirs = make(spec), make(spec)
    train(ours, SGD(ours.parameters()), mode="decoupled", strength=8.0)
    train(theirs, SGD(theirs.parameters()), mode="coupled", strength=8.0)
    for name, value in ours.named_parameters():
        torch.testing.assert_close(value, dict(theirs.named_parameters())[name], rtol=0, atol=3e-7)


def test_coupled_reaches_the_memory():
    caged, plain = make(), make()
    ours, theirs = ADAMW(caged.parameters()), ADAMW(plain.parameters())
    train(caged, ours, mode="coupled", strength=5.0, steps=1)
    train(plain, theirs, steps=1)
    first = next(iter(ours.state.values()))["exp_avg"], next(iter(theirs.state.values()))["exp_avg"]
    assert not torch.equal(*first)


def test_it_takes_each_groups_own_rate_and_leaves_what_is_not_trained():
    model = make("int4-channel")
    model[2].weight.requires_grad_(False)
    frozen = model[2].weight.detach().clone()
    optimizer = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.05}], lr=1.0)
    e = next(weights_of(model)).matrix() - next(weights_of(model)).quantized()
    before = model[0].weight.detach().clone()
    train(model, optimizer, strength=4.0, steps=1, zero_gradient=True)
    torch.testing.assert_close(model[0].weight, before - 0.2 * e, rtol=0, atol=1e-7)
    assert torch.equal(model[2].weight, frozen)


def test_the_schedule():
    strengths = [pull_strength(t, 100, strength=10.0, silence=0.8) for t in range(100)]
    assert strengths[:80] == [0.0] * 80
    assert strengths[80:] == pytest.approx([10.0 * (t + 1 - 80) / 20 for t in range(80, 100)])
    constant = [pull_strength(t, 10, strength=2.5, silence=0.5, ramp="none") for t in range(10)]
    assert constant == [0.0] * 5 + [2.5] * 5
    assert pull_strength(0, 10, strength=1.0, silence=0.0) == pytest.approx(0.1)


def test_what_cannot_work():
    with pytest.raises(ValueError, match="write mode='decoupled' or mode='coupled'"):
        Cage("both")
    model = make()
    with pytest.raises(ValueError, match=r"0\.weight: learning rate 0\.02 times strength 60 .* strength=5 or less"):
        train(model, SGD(model.parameters()), strength=60.0)
