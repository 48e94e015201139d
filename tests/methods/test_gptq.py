"""GPTQ as a method: what it asks of QATCallback. The solver itself: tests/solvers/test_gptq.py."""

from qlightning import solvers
from qlightning.methods import GPTQ, LSQ, compose
from qlightning.numerics import PerChannel, PerGroup, parse


def test_what_it_determines() -> None:
    asked = GPTQ(3, granularity=32, order="activation", batches=4).quantization()
    assert asked["weight"] == parse("int3-g32-asym")
    assert asked["init"] == solvers.GPTQ(order="activation", batches=4)
    assert GPTQ().quantization()["weight"].granularity == PerChannel()
    assert GPTQ(granularity=64).quantization()["weight"].granularity == PerGroup(64)


def test_the_start_of_another_methods_grid() -> None:
    (qat,) = compose(LSQ(bits=3), GPTQ(bits=None, batches=2))
    assert qat.init == solvers.GPTQ(batches=2)
    assert qat.rules["*"].weight == LSQ(bits=3).quantization()["weight"]
