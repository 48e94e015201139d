import math

import pytest

from qlightning.schedules import to_steps
from qlightning.schedules.steps import known


def test_ints_are_steps_and_floats_are_shares():
    assert to_steps(0, 50) == 0
    assert to_steps(1, 50) == 1
    assert to_steps(1.0, 50) == 50
    assert to_steps(0.3, 50) == 15
    assert to_steps(80, 50) == 80


def test_a_share_of_an_unknown_length_is_refused():
    assert to_steps(7, math.inf) == 7
    with pytest.raises(ValueError, match=r"set trainer\.max_steps or trainer\.max_epochs"):
        to_steps(0.5, math.inf)
    with pytest.raises(ValueError, match="max_steps"):
        known(math.inf)


@pytest.mark.parametrize("moment", [-1, -0.1, math.nan, math.inf, True])
def test_what_is_no_moment_is_refused(moment):
    with pytest.raises(ValueError, match="write steps as 100"):
        to_steps(moment, 50)


def test_a_float_above_one_is_taken_for_a_slip():
    with pytest.raises(ValueError, match="write steps as 300"):
        to_steps(300.0, 1000)
