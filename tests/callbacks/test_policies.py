"""Policies by themselves; what they do to a run is in test_finite.py."""

import pytest
import torch

from qlightning import Raise, SkipStep
from qlightning.callbacks.policies import Before


def test_what_a_batch_changed_is_put_back(kit):
    module = kit.Net()
    module.register_buffer("mean", torch.zeros(3))
    before = Before.of(kit.trainer(), module)
    module.mean += 2
    before.put_back(module)
    assert module.mean.tolist() == [0, 0, 0]


def test_patience_is_in_the_checkpoint(kit):
    policy, other = SkipStep(2), SkipStep(2)
    with pytest.warns(UserWarning, match="left out step 1"):
        policy.bad("step 1")
    other.load_state_dict(policy.state_dict())
    with pytest.warns(UserWarning, match="left out step 2"):
        other.bad("step 2")
    with pytest.raises(ValueError, match="step 3, and in the 2 steps before"):
        other.bad("step 3")


def test_an_error_says_what_to_do():
    with pytest.raises(ValueError, match=r"step 1; take a smaller learning rate.*FiniteCallback\(SkipStep\(\)\)"):
        Raise().bad("step 1")
