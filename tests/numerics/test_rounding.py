"""Roundings: nearest as numpy's rint; stochastic unbiased, replayable and independent of the global generator."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlightning.numerics import Float, HalfUp, Int, Learned, Levels, Nearest, PerTensor, Quantizer, Stochastic, parse
from qlightning.numerics.rounding import fold
from qlightning.numerics.spec import describe, rebuild


def draws(x: torch.Tensor, rounding: Stochastic, count: int) -> torch.Tensor:
    """The roundings of x in `count` successive steps, (count, ...)."""
    results = []
    for _ in range(count):
        results.append(rounding.round(x, rounding.key()))
        rounding.advance()
    return torch.stack(results)


@given(x=st.floats(-1e6, 1e6, width=32))
def test_nearest_is_numpys_rint(x):
    for value in (x, math.floor(x) + 0.5):
        position = torch.tensor([value], dtype=torch.float32)
        assert Nearest().round(position, Nearest().key()).numpy() == np.rint(np.float32(value))


@given(x=st.floats(-1e6, 1e6, width=32), step=st.integers(0, 2**40), seed=st.integers(0, 2**31))
def test_stochastic_takes_one_of_the_two_neighbours_and_keeps_integers(x, step, seed):
    rounding = Stochastic(seed=seed).train()
    rounding.step.fill_(step)
    position = torch.tensor([x, math.floor(x)], dtype=torch.float32)
    rounded, whole = rounding.round(position, rounding.key()).tolist()
    assert rounded in (math.floor(x), math.ceil(x))
    assert whole == math.floor(x)


def test_large_integers_never_move():
    """floor(x + u) would carry 32767 to 32768 once in a thousand draws, since float32 has no room for the fraction."""
    x = torch.full((100_000,), 32767.0)
    rounding = Stochastic().train()
    assert torch.equal(rounding.round(x, rounding.key()), x)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999])
@pytest.mark.parametrize("base", [0.0, 100.0, -100.0])
def test_stochastic_is_unbiased(base, fraction):
    count = 200_000
    x = torch.full((count,), base + fraction, dtype=torch.float64).float()
    rounding = Stochastic(seed=3).train()
    up = rounding.round(x, rounding.key()).double() - base
    exact = float(x[0].double()) - base
    assert abs(up.mean().item() - exact) <= 5 * math.sqrt(exact * (1 - exact) / count)
    assert set(up.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    "quantizer",
    [
        Quantizer(Int(4, range="narrow"), rounding=Stochastic()),
        Quantizer(Float(2, 1), rounding=Stochastic()),
        Quantizer(Levels([-1.0, -0.3, 0.1, 1.0]), rounding=Stochastic()),
        parse("ternary-absmax-sr-tensor"),
        parse("binary-absmax-sr-tensor"),
        parse("int4-asym-tensor-sr"),
    ],
    ids=repr,
)
def test_every_format_is_unbiased_inside_its_range(quantizer):
    """The range of an asymmetric grid ends at its rounded zero point: it is tried from zero up, where that is exact."""
    count = 4000
    x = torch.linspace(-1 if quantizer.format.symmetric else 0, 1, 41).expand(count, -1)
    mean = quantizer.train()(x).mean(0)
    values = torch.tensor(quantizer.format.values()) * float(quantizer.quantize(x).scale)
    widest = float((values[1:] - values[:-1]).max())
    assert float((mean - x[0]).abs().max()) < 5 * widest / 2 / math.sqrt(count)
    assert not torch.equal(quantizer(x)[0], quantizer(x)[1])


def test_draws_of_elements_and_steps_are_uncorrelated():
    noise = draws(torch.full((20_000,), 0.5), Stochastic(seed=1).train(), 4) - 0.5
    other = draws(torch.full((20_000,), 0.5), Stochastic(seed=2).train(), 1) - 0.5
    bound = 5 / math.sqrt(20_000)
    for a in range(4):
        assert abs(4 * float((noise[a] * other[0]).mean())) < bound, "seeds"
        for shift in (1, 2, 64, 1024):
            assert abs(4 * float((noise[a] * noise[a].roll(shift)).mean())) < bound, f"elements {shift} apart"
        for b in range(a):
            assert abs(4 * float((noise[a] * noise[b]).mean())) < bound, "steps"


def test_a_key_replays_and_a_step_changes_the_numbers():
    x = torch.rand(1000)
    rounding = Stochastic().train()
    key = rounding.key()
    first = rounding.round(x, key)
    assert torch.equal(rounding.round(x, rounding.key()), first)
    rounding.advance()
    assert not torch.equal(rounding.round(x, rounding.key()), first)
    assert torch.equal(rounding.round(x, key), first)
    assert not torch.equal(Stochastic(seed=1).train().round(x, Stochastic(seed=1).train().key()), first)


def test_the_global_generator_is_neither_read_nor_moved():
    x = torch.rand(100)
    rounding = Stochastic().train()
    torch.manual_seed(0)
    first = rounding.round(x, rounding.key())
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(rounding.round(x, rounding.key()), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_stream_continues_after_a_checkpoint():
    quantizer, x = parse("int4-sr").train(), torch.randn(4, 64)
    for _ in range(5):
        quantizer.rounding.advance()
    file = io.BytesIO()
    torch.save(quantizer.state_dict(), file)
    file.seek(0)
    resumed = parse("int4-sr").train()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        assert torch.equal(resumed(x), quantizer(x))
        assert torch.equal(copy.deepcopy(quantizer)(x), quantizer(x))
        resumed.rounding.advance()
        quantizer.rounding.advance()
    assert not torch.equal(parse("int4-sr").train()(x), quantizer(x))


def test_eval_mode_rounds_to_nearest():
    x = torch.randn(4, 64)
    assert torch.equal(parse("int4-sr").eval()(x), parse("int4")(x))
    assert not torch.equal(parse("int4-sr").train()(x), parse("int4")(x))


def test_backward_replays_the_noise_of_its_forward():
    """The scale's gradient depends on the codes, so a second draw in backward would show."""
    quantizer = Quantizer(Int(4), PerTensor(), scale=Learned(), rounding=Stochastic())
    quantizer.build((8, 8))
    quantizer.initialize(x := torch.randn(8, 8))
    quantizer.train()
    y = quantizer(x)
    quantizer.rounding.advance()
    y.sum().backward()
    step = quantizer.scale.value.detach()
    expected = (y.detach() / step - x / step).sum()
    torch.testing.assert_close(quantizer.scale.value.grad.sum(), expected)


def test_ties_may_go_up() -> None:
    """Every tie of E2M1 towards positive infinity, as in MS-AMP's FP4 kernel; everything else as to the nearest."""
    ties = torch.tensor([-5.0, -3.5, -2.5, -1.75, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    up = Float(2, 1).snap(ties, lambda position: HalfUp().round(position, None))
    assert up.tolist() == [-4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    x = torch.randn(10_000) * 3
    assert torch.equal(HalfUp().round(x, None), torch.round(x))
    just_below = torch.tensor([0.5 - 2.0**-25, -0.5 - 2.0**-24, 2.0**23 - 0.5])
    assert HalfUp().round(just_below, None).tolist() == [0.0, -1.0, 2.0**23]


def test_ties_are_part_of_what_is_deployed() -> None:
    even, up = (Quantizer(Float(2, 1), rounding=rounding) for rounding in (Nearest(), HalfUp()))
    assert not even.deploys_like(up)
    assert rebuild(describe(up)) == up


def test_a_folded_key_is_another_for_each_number_and_that_of_zero_the_same() -> None:
    key = Stochastic(seed=1).key()
    assert torch.equal(fold(key, 0), key)
    assert len({int(fold(key, number)) for number in range(100)}) == 100
    assert fold(None, 3) is None
