"""Flips and frequencies against a loop over single elements; distances against all thresholds, one by one."""

import itertools

import pytest
import torch
from torch import nn

from qlightning.layers.convert import convert
from qlightning.numerics import Binary, Float, Int, Ternary, parse
from qlightning.optim import weights_of
from qlightning.optim.oscillation import Tracker, coded, elementwise, positions, threshold_distance


def reference(sequence, momentum):
    """Flip rate, frequency and mean of one element, as the paper's equations read."""
    frequency, mean, last, flips = 0.0, float(sequence[0]), 0, 0
    for before, now in itertools.pairwise(sequence):
        change = (now > before) - (now < before)
        oscillates = change * last < 0
        frequency = momentum * oscillates + (1 - momentum) * frequency
        mean = momentum * now + (1 - momentum) * mean
        last = change or last
        flips += change != 0
    return flips / (len(sequence) - 1), frequency, mean


def test_against_a_loop_over_elements():
    codes = torch.randint(-2, 3, (12, 3, 4), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    codes[:, 0, 0] = 1  # never changes
    codes[:, 0, 1] = torch.tensor([0, 1] * 6)  # in every step but the first
    codes[:, 0, 2] = torch.arange(12) // 2 - 3  # climbs
    tracker = Tracker(momentum=0.2)
    for step in codes:
        tracker.update(step, Int(4))
    flips = 0.0
    for i in range(3):
        for j in range(4):
            flip, frequency, mean = reference(codes[:, i, j].tolist(), 0.2)
            flips += flip / 12
            assert float(tracker.frequency[i, j]) == pytest.approx(frequency, abs=1e-6)
            assert float(tracker.mean[i, j]) == pytest.approx(mean, abs=1e-5)
    assert tracker.take_flip_rate() == pytest.approx(flips)
    assert tracker.take_flip_rate() == 0.0
    assert tracker.frequency[0, 0] == tracker.frequency[0, 2] == 0
    assert tracker.frequency[0, 1] == tracker.frequency.max()


def test_directions_are_those_of_values_and_not_of_codes():
    """The codes of a sign-magnitude format grow where its values fall."""
    format = Float(2, 1)
    values = torch.tensor([[-1.0, 1.0], [-2.0, 2.0], [-1.5, 1.5]])
    tracker = Tracker(momentum=0.5)
    for q in values:
        tracker.update(format.encode(q), format)
    assert tracker.frequency.tolist() == [0.5, 0.5]


def test_freezing_holds_the_code_nearest_to_the_mean():
    tracker = Tracker(momentum=0.3)
    for step in range(9):
        tracker.update(torch.tensor([2 + step % 2, 5, -step], dtype=torch.int8), Int(4))
    tracker.freeze(0.2, Int(4))
    assert tracker.frozen.tolist() == [True, False, False]
    assert int(tracker.held[0]) == round(float(tracker.mean[0]))
    held = tracker.held.clone()
    for _ in range(9):
        tracker.update(torch.tensor([7, 5, 5], dtype=torch.int8), Int(4))
    tracker.freeze(0.2, Int(4))
    assert int(tracker.held[0]) == int(held[0])


def test_the_state_is_all_there_is():
    codes = torch.randint(-2, 3, (8, 5), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    whole, first, second = (Tracker(momentum=0.1) for _ in range(3))
    for step in codes:
        whole.update(step, Int(4))
    for step in codes[:5]:
        first.update(step, Int(4))
    second.load_state_dict(first.state_dict(), device=torch.device("cpu"))
    for step in codes[5:]:
        second.update(step, Int(4))
    assert torch.equal(whole.frequency, second.frequency)
    assert whole.take_flip_rate() == second.take_flip_rate()


@pytest.mark.parametrize("format", [Int(4), Int(2, symmetric=False), Ternary(), Binary(), Float(2, 1)], ids=repr)
def test_the_distance_to_the_thresholds_on_either_side(format):
    v = torch.randn(100, generator=torch.Generator().manual_seed(2)) * 5
    thresholds = [((low + high) / 2, high - low) for low, high in itertools.pairwise(sorted(set(format.values())))]
    for x, distance in zip(v.tolist(), threshold_distance(v, format).tolist(), strict=True):
        below = [(x - t) / gap for t, gap in thresholds if t < x][-1:]
        above = [(t - x) / gap for t, gap in thresholds if t >= x][:1]
        assert distance == pytest.approx(min(below + above), abs=1e-5)


@pytest.mark.parametrize("spec", ["int4-g8", "int4-channel-lsq", "int3-asym-channel"])
def test_positions_round_to_the_codes(spec):
    model = nn.Sequential(nn.Linear(16, 4))
    convert(model, spec)
    (weight,) = weights_of(model)
    quantizer, matrix = elementwise(weight), weight.matrix()
    v = positions(quantizer, matrix, weight.state(matrix))
    codes = quantizer.codes(matrix, weight.state(matrix), None)
    assert torch.equal(quantizer.format.encode(quantizer.format.snap(v.clone(), torch.round)), codes)
    assert coded(weight) is quantizer


def test_another_basis_has_codes_but_no_elements_to_hold():
    from qlightning.numerics.transform import Basis

    class Flip(Basis):
        def build(self, *args, **kwargs):
            pass

        def forward(self, x):
            return x.flip(-1)

        def inverse(self, x):
            return x.flip(-1)

    model = nn.Sequential(nn.Linear(16, 4))
    quantizer = parse("int4-channel")
    quantizer.transform = Flip()
    convert(model, quantizer)
    (weight,) = weights_of(model)
    v = positions(coded(weight), weight.matrix(), weight.state(weight.matrix()))
    codes = coded(weight).codes(weight.matrix(), weight.state(weight.matrix()), None)
    assert torch.equal(torch.round(v).clamp(-8, 7).to(torch.int8), codes)
    with pytest.raises(ValueError, match=r"0\.weight cannot be held .*: it is quantized in another basis"):
        elementwise(weight)
