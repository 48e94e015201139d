"""The integer program: one option for each layer, the smallest sum of loss increases, within a budget.

Layer-wise Calibration and Integer Programming (Hubara et al., ICML 2021, CalibTIP). It is exact for a model that is
not: that the increases of single layers add up. Evaluate what it chooses.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from qlightning.allocation.sensitivity import Option
from qlightning.layers.scheme import Spec

Cost = Literal["bytes", "bit_operations"]


class Allocation(NamedTuple):
    """What was chosen.

    Attributes:
        choices: The option of every layer, by its names.
        increase: The predicted increase of the loss, the sum over layers.
        cost: What it costs, in the unit of the budget.
    """

    choices: dict[tuple[str, ...], Option]
    increase: float
    cost: int

    @property
    def rules(self) -> dict[str, Spec | None]:
        """For `QATCallback(rules=...)` or `convert`. A rule also matches longer names that end alike, these follow."""
        specs = {name: option.spec for names, option in self.choices.items() for name in names}
        return {name: specs[name] for name in sorted(specs, key=len)}


def allocate(
    options: Mapping[tuple[str, ...], Sequence[Option]], *, budget: float, of: Cost = "bytes", floor: float = 1e-6
) -> Allocation:
    """The best allocation within a budget.

    Args:
        options: The options of every layer, as `measure_sensitivity` gives them.
        budget: The most that all layers together may cost.
        of: What the budget is of: "bytes" of the weights, or "bit_operations" of a batch.
        floor: Increases below it count as it: a layer whose loss falls by chance is not worth more than one whose loss
            stays.

    Raises:
        ValueError: Even the cheapest options cost more than the budget.
    """
    if not options or any(not layer for layer in options.values()):
        raise ValueError("nothing to allocate: every layer needs at least one option")
    flat = [(i, option) for i, layer in enumerate(options.values()) for option in layer]
    cost = np.array([float(getattr(option, of)) for _, option in flat])
    least = sum(min(getattr(option, of) for option in layer) for layer in options.values())
    if least > budget:
        raise ValueError(
            f"a budget of {budget:g} {of} cannot be met: the cheapest options cost {least}; raise it, budget={least}, "
            "or add cheaper candidates"
        )
    increase = np.array([max(option.increase, floor) for _, option in flat])
    if not np.isfinite(increase).all():
        raise ValueError("an increase of the loss is not finite: leave out the candidates that break the model")
    chosen = _solve(increase, cost, [i for i, _ in flat], budget)
    picked = [option for (_, option), taken in zip(flat, chosen, strict=True) if taken]
    total = sum(getattr(option, of) for option in picked)
    return Allocation(dict(zip(options, picked, strict=True)), sum(option.increase for option in picked), total)


def _solve(increase: np.ndarray, cost: np.ndarray, layer: list[int], budget: float) -> np.ndarray:
    """Which options are taken, (options,) bools."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    one_each = np.arange(max(layer) + 1)[:, None] == np.array(layer)[None, :]
    unit, limit = max(budget, 1.0), budget
    while True:
        found = milp(
            increase / increase.max(),  # of order 1, as the tolerances of the solver expect
            integrality=np.ones(len(layer)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each.astype(float), 1, 1),
                LinearConstraint(cost / unit, ub=limit / unit),
            ],
            options={"mip_rel_gap": 0.0},
        )
        if not found.success:
            raise ValueError(f"no allocation was found: {found.message}")
        taken = np.asarray(found.x) > 0.5
        over = float(cost[taken].sum()) - budget
        if over <= 0:
            return taken
        limit -= over  # the solver's tolerance may let a large budget be passed by a few bytes
