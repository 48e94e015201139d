"""Every generator draws again what it would have drawn."""

import io
import random

import numpy as np
import pytest
import torch

from qlightning.evaluation.random_state import random_state, restore_random_state


def draw() -> list:
    return [
        *(random.random(), random.gauss(0, 1), random.getrandbits(70)),
        *np.random.normal(size=3).tolist(),
        *(int(np.random.randint(1 << 30)), float(np.random.standard_normal())),
        *torch.rand(3).tolist(),
        *torch.randperm(5).tolist(),
    ]


@pytest.mark.parametrize("advance", range(4))
def test_restored_generators_repeat(advance):
    """Odd numbers of normal deviates leave one cached in Python's and numpy's generators."""
    for _ in range(advance):
        random.gauss(0, 1), np.random.normal(), torch.randn(1)
    state = random_state()
    first = draw()
    assert draw() != first
    restore_random_state(state)
    assert draw() == first


def test_it_survives_a_checkpoint_of_plain_data():
    random.gauss(0, 1), np.random.normal()
    file = io.BytesIO()
    torch.save(random_state(), file)
    first = draw()
    file.seek(0)
    restore_random_state(torch.load(file, weights_only=True))
    assert draw() == first


def test_looking_draws_nothing():
    state = random_state()
    first = draw()
    restore_random_state(state)
    random_state()
    assert draw() == first


def test_a_state_is_a_copy():
    state = random_state()
    before = state["torch"].clone()
    draw()
    assert torch.equal(state["torch"], before)
