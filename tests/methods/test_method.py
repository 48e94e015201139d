"""How methods compose."""

from typing import Any

import pytest
from lightning.pytorch import Callback

from qlightning.callbacks.qat import QATCallback
from qlightning.methods import LSQ, Method, Quantization, compose


class Adds(Method):
    """Adds a callback."""

    def extras(self) -> list[Callback]:
        return [Callback()]


class Refuses(Method):
    """Makes no sense beside LSQ."""

    def check(self, others: Any) -> None:
        if any(isinstance(other, LSQ) for other in others):
            raise ValueError("no")


def test_one_method_is_its_own_composition() -> None:
    (callback,) = LSQ(bits=3, start=0.5).callbacks()
    assert isinstance(callback, QATCallback)
    assert callback.start == 0.5


def test_methods_that_determine_different_things_make_one_qat_callback() -> None:
    qat, other = compose(LSQ(bits=3), Quantization(min_coverage=0.9, rules={"lm_head": "int8"}), Adds())
    assert isinstance(qat, QATCallback)
    assert type(other) is Callback
    assert qat.min_coverage == 0.9
    assert qat.rules["lm_head"] == "int8"


def test_what_two_methods_determine_alike_is_no_conflict() -> None:
    assert len(compose(LSQ(bits=3, start=0.5), Quantization(start=0.5))) == 1


def test_what_is_left_at_its_default_is_not_determined() -> None:
    (callback,) = compose(LSQ(bits=3), Quantization(start=0.8, input="int8-token"))
    assert callback.start == 0.8


def test_a_conflict_names_both_and_what_they_say() -> None:
    with pytest.raises(ValueError, match=r"LSQ determines start=0\.5 and Quantization start=0\.8"):
        compose(LSQ(start=0.5), Quantization(start=0.8))


def test_rules_for_the_same_layers_are_a_conflict() -> None:
    one, other = (Quantization(rules={"head": spec}) for spec in ("int8", "int4"))
    with pytest.raises(ValueError, match="'head': 'int8'"):
        compose(one, other)
    with pytest.raises(ValueError, match="a rule for every layer"):
        compose(LSQ(), Quantization(rules={"*": "int4"}))


def test_a_method_may_refuse_another() -> None:
    with pytest.raises(ValueError, match="no"):
        compose(Refuses(), LSQ())
    assert compose(Refuses()) == []
