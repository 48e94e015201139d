"""AWQ as a method: what it asks of QATCallback. The solver itself: tests/solvers/test_awq.py."""

import pytest

from qlightning import solvers
from qlightning.methods import AWQ, GPTQ, L4Q, LSQ, compose
from qlightning.numerics import PerChannel, parse


def test_what_it_determines() -> None:
    asked = AWQ(3, granularity=32, grid=10, shrink=0.0, batches=4, start=0.5).quantization()
    assert asked["weight"] == parse("int3-g32-asym")
    assert asked["init"] == solvers.AWQ(grid=10, shrink=0.0, batches=4)
    assert asked["start"] == 0.5
    assert AWQ(granularity="channel").quantization()["weight"].granularity == PerChannel()
    composed = AWQ(then="gptq", batches=4).quantization()["init"]
    assert composed == solvers.AWQ(batches=4, then=solvers.GPTQ(batches=4))
    with pytest.raises(ValueError, match="then='nearest' or then='gptq'"):
        AWQ(then="rtn")


def test_the_start_of_another_methods_grid() -> None:
    (qat,) = compose(AWQ(bits=None, batches=2), LSQ(bits=3))
    assert qat.init == solvers.AWQ(batches=2)
    assert qat.rules["*"].weight == LSQ(bits=3).quantization()["weight"]
    with pytest.raises(ValueError, match="AWQ determines weight"):
        compose(AWQ(), LSQ(bits=3))


def test_what_it_does_not_go_with() -> None:
    with pytest.raises(ValueError, match=r"write AWQ\(then='gptq'\)"):
        compose(AWQ(), GPTQ(bits=None))
    with pytest.raises(ValueError, match="L4Q has adapters inside the quantizer"):
        compose(AWQ(bits=None), L4Q())
