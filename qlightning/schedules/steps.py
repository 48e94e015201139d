"""A moment of a run, written as a step (int) or as a share of the run (float), as a number of steps."""

import math


def to_steps(moment: int | float, total: float) -> int:
    """The number of steps that `moment` stands for.

    >>> to_steps(100, 700), to_steps(0.25, 700), to_steps(1.0, 700)
    (100, 175, 700)

    Args:
        moment: An int counts steps, a float in [0, 1] is a share of the run: `1` is one step, `1.0` the whole run.
        total: Length of the run in steps; `math.inf` where it is not known.

    Raises:
        ValueError: The moment is negative, a float above 1, or a share of a run whose length is not known.
    """
    if isinstance(moment, bool) or not 0 <= moment < math.inf:
        raise ValueError(f"{moment!r} is no moment of a run: write steps as 100 or a share of the run as 0.1")
    if isinstance(moment, int):
        return moment
    if moment > 1:
        raise ValueError(f"{moment!r} is above 1: write steps as {round(moment)} or a share of the run as 0.1")
    return round(moment * known(total))


def known(total: float) -> int:
    """The length of the run as an int.

    Args:
        total: Length of the run in steps; `math.inf` where it is not known.

    Raises:
        ValueError: The length is not known.
    """
    if not math.isfinite(total):
        raise ValueError("a share of a run needs the run's length: set trainer.max_steps or trainer.max_epochs")
    return int(total)
