"""The program against every possible allocation of small cases."""

import itertools

import numpy as np
import pytest

from qlightning.allocation import Option, allocate


def random_options(rng, layers, candidates):
    return {
        (f"layer{i}",): [
            Option(
                f"int{2 + k}",
                float(rng.normal(0.3, 0.4)) / (k + 1),
                int(rng.integers(1, 40)) * (k + 1),
                int(rng.integers(1, 1000)),
            )
            for k in range(candidates)
        ]
        for i in range(layers)
    }


def brute_force(options, budget, of, floor):
    best = None
    for choice in itertools.product(*options.values()):
        if sum(getattr(option, of) for option in choice) <= budget:
            value = sum(max(option.increase, floor) for option in choice)
            best = value if best is None else min(best, value)
    return best


@pytest.mark.parametrize("of", ["bytes", "bit_operations"])
def test_it_is_the_best_of_all(of):
    rng = np.random.default_rng(0)
    solved = 0
    for _ in range(25):
        options = random_options(rng, int(rng.integers(1, 6)), int(rng.integers(1, 5)))
        costs = [[getattr(option, of) for option in layer] for layer in options.values()]
        low, high = sum(map(min, costs)), sum(map(max, costs))
        budget = float(rng.uniform(low - 5, high + 5))
        best = brute_force(options, budget, of, 1e-6)
        if best is None:
            with pytest.raises(ValueError, match="cannot be met"):
                allocate(options, budget=budget, of=of)
            continue
        solved += 1
        found = allocate(options, budget=budget, of=of)
        assert sum(max(option.increase, 1e-6) for option in found.choices.values()) == pytest.approx(best, abs=1e-9)
        assert found.cost == sum(getattr(option, of) for option in found.choices.values()) <= budget
        assert found.increase == pytest.approx(sum(option.increase for option in found.choices.values()))
        assert all(option in options[names] for names, option in found.choices.items())
    assert solved > 15


def test_a_budget_that_fits_exactly_is_met():
    options = {("a",): [Option("int2", 1.0, 10, 1), Option("int8", 0.0, 40, 1)], ("b",): [Option("int2", 2.0, 10, 1)]}
    found = allocate(options, budget=50)
    assert found.rules == {"a": "int8", "b": "int2"}
    assert found.cost == 50
    assert allocate(options, budget=49.999).rules == {"a": "int2", "b": "int2"}
    with pytest.raises(ValueError, match=r"19 bytes cannot be met: the cheapest options cost 20; raise it, budget=20"):
        allocate(options, budget=19)


def test_a_large_budget_is_not_passed_by_a_single_byte():
    options = {(f"l{i}",): [Option("int4", 1.0, 10**9 + i, 1), Option("int8", 0.0, 2 * 10**9 + i, 1)] for i in range(3)}
    exact = 2 * (2 * 10**9) + 10**9 + 3  # two layers in int8
    assert allocate(options, budget=exact).cost == exact
    assert allocate(options, budget=exact - 1).cost < exact


def test_tiny_increases_still_decide():
    """Losses of a large language model differ in the fifth digit."""
    options = {
        (f"l{i}",): [Option("int4", 1e-5 * (i + 1), 4, 1), Option("int8", 5e-6 / (i + 1), 8, 1)] for i in range(12)
    }
    found = allocate(options, budget=12 * 6)
    assert [option.spec for option in found.choices.values()] == ["int4"] * 6 + ["int8"] * 6


def test_noise_below_the_floor_is_no_gain():
    """A layer whose loss falls by chance, more at eight bits than at two, beside one that truly needs them."""
    options = {
        ("lucky",): [Option("int2", -0.1, 1, 1), Option("int8", -0.5, 4, 1)],
        ("needy",): [Option("int2", 0.3, 1, 1), Option("int8", 0.0, 4, 1)],
    }
    assert allocate(options, budget=5).rules == {"lucky": "int2", "needy": "int8"}
    assert allocate(options, budget=5, floor=-1.0).rules == {"lucky": "int8", "needy": "int2"}


def test_rules_put_longer_names_last():
    options = {
        ("net.0",): [Option("int8", 0.0, 1, 1)],
        ("0",): [Option("int4", 0.0, 1, 1)],
        ("head", "table"): [Option(None, 0.0, 1, 1)],
    }
    rules = allocate(options, budget=10).rules
    assert list(rules.items()) == [("0", "int4"), ("head", None), ("net.0", "int8"), ("table", None)]


def test_what_cannot_work():
    with pytest.raises(ValueError, match="at least one option"):
        allocate({}, budget=1)
    with pytest.raises(ValueError, match="not finite"):
        allocate({("a",): [Option("int2", float("nan"), 1, 1)]}, budget=1)
