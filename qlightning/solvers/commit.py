"""Commit: a solution becomes the weight of its layer."""

from typing import Literal

import torch
from torch import Tensor

from qlightning.capture import Site
from qlightning.numerics.quantizer import Quantizer
from qlightning.solvers.lattice import Lattice
from qlightning.solvers.moments import write
from qlightning.solvers.solver import SiteSolution


def commit(site: Site, solution: SiteSolution, keep: Literal["values", "residual"]) -> None:
    """Write a solution into its weight and let its quantizer act, or not, so that the layer runs on just these values.

    Args:
        site: Where.
        solution: What was found.
        keep: "values": the weight becomes the solution. "residual": it becomes the solution plus the rest of the float
            weight, up to 0.49 steps and where that does not change the quantized value.

    Raises:
        ValueError: The quantizer does not give the solution back.
    """
    weight, quantizer = site.weight, site.quantizer
    values = solution.values.to(weight.dtype)
    if not solution.on_grid:
        write(site, values)
        quantizer.enabled = False
        return
    write(site, values if keep == "values" else _with_residual(values, weight, quantizer))
    quantizer.enabled = True
    if not torch.equal(rounded(quantizer, site.weight), values):
        raise ValueError(
            f"{site.name}: the solution is not on the grid of {quantizer!r} as {weight.dtype} holds it: keep the "
            "weights in float32, or take fewer bits"
        )


@torch.no_grad()
def rounded(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """The weight rounded to nearest on its own grid, in its dtype."""
    return quantizer.values(weight, quantizer.grid(weight), None)


def _with_residual(values: Tensor, weight: Tensor, quantizer: Quantizer) -> Tensor:
    lattice, solved = Lattice(quantizer, weight), Lattice(quantizer, values).weight
    reach = 0.49 * lattice.step
    master = lattice.values(solved + (lattice.weight - solved).clamp(-reach, reach)).to(weight.dtype)
    kept = rounded(quantizer, master) == values
    if lattice.basis is not None:  # whose entries go together
        return master if bool(kept.all()) else values
    return torch.where(kept, master, values)
