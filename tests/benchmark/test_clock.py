"""Time by turns, and bytes that are kept for backward."""

import time

import pytest
import torch
from torch import nn

from qlightning.benchmark.clock import interleaved, peak, saved_for_backward

CPU = torch.device("cpu")


def test_everyone_takes_a_turn_in_every_round_and_nobody_is_always_first() -> None:
    turns = []
    steps = {name: lambda name=name: turns.append(name) for name in "abc"}
    seconds = interleaved(steps, rounds=3, repeats=2, device=CPU, clock="wall")
    assert "".join(turns) == "aabbcc" + "bbccaa" + "ccaabb"
    assert [len(each) for each in seconds.values()] == [3, 3, 3]


def test_wall_time_sees_what_cpu_time_does_not() -> None:
    steps = {"sleeps": lambda: time.sleep(0.05)}
    (wall,) = interleaved(steps, rounds=1, repeats=2, device=CPU, clock="wall")["sleeps"]
    (cpu,) = interleaved(steps, rounds=1, repeats=2, device=CPU, clock="cpu")["sleeps"]
    assert wall >= 0.05 > 10 * cpu


def test_the_input_of_a_linear_layer_is_kept_once_and_its_weight_is_not_counted() -> None:
    model, x = nn.Linear(8, 4), torch.randn(16, 8)
    assert saved_for_backward(lambda: model(x).sum(), model) == 16 * 8 * 4
    both = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    assert saved_for_backward(lambda: both(x).sum(), both) == 2 * 16 * 8 * 4


def test_a_cpu_has_no_peak() -> None:
    assert peak(lambda: pytest.fail("not run"), CPU) is None
