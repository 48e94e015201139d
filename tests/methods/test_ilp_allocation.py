"""Integer allocation as a method; its program is in tests/allocation/, its run in tests/callbacks/."""

import pytest

from qlightning.callbacks.allocation import AllocationCallback
from qlightning.callbacks.normalization import Normalization
from qlightning.callbacks.qat import QATCallback
from qlightning.methods import LSQ, IntegerAllocation, compose
from qlightning.numerics import Int
from qlightning.solvers import AdaQuant


def test_what_it_is_made_of() -> None:
    qat, allocation = IntegerAllocation(["int3-g32", "int6-g32"], budget=5.0, batches=2).callbacks()
    assert isinstance(qat, QATCallback)
    assert qat.rules["*"].weight.format == Int(6)
    assert isinstance(allocation, AllocationCallback)
    assert [candidate.format for candidate in allocation.candidates] == [Int(3), Int(6)]
    assert (allocation.budget, allocation.of, allocation.batches) == (5.0, "bytes", 2)


def test_the_advanced_pipeline() -> None:
    candidates = ["int2-channel-asym-learned", "int8-channel-asym-learned"]
    _, allocation, norms = IntegerAllocation(candidates, layers="adaquant", steps=7, norms="measured").callbacks()
    assert isinstance(allocation, AllocationCallback)
    assert allocation.solver == AdaQuant(steps=7, batches=4)
    assert isinstance(norms, Normalization)
    with pytest.raises(ValueError, match="candidates with learned scales"):
        IntegerAllocation(layers="adaquant")
    with pytest.raises(ValueError, match="norms='kept' or 'measured'"):
        IntegerAllocation(norms="folded")  # type: ignore[arg-type]


def test_candidates_that_a_run_cannot_switch_between() -> None:
    with pytest.raises(ValueError, match="granularity and transform stay what they are"):
        IntegerAllocation(["int2-g32", "int4-channel"])
    with pytest.raises(ValueError, match="at least two"):
        IntegerAllocation(["int4-channel"])
    with pytest.raises(ValueError, match="one run has one of them"):
        compose(IntegerAllocation(), LSQ())
