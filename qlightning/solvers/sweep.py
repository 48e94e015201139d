"""The sweep that GPTQ and LDLQ share, and the coordinate descent that may follow it.

Columns are rounded one after another, each with a correction for the errors of those before it:

    q_k = nearest(w_k + (W - Wq)[:, :k] U[:k, k]),    H = (U + I) D (U + I)^T, U strictly upper

This is LDLQ as written by QuIP (arXiv 2307.13304, section 3). GPTQ (arXiv 2210.17323) updates the remaining weights by
the inverse Hessian instead, which comes to the same numbers for every rounding: with R R^T = H^-1's unit lower factor,
its running errors e satisfy W - Wq = e (U + I)^-1. Here the first form: it needs no inverse.

Shapes: r output channels, d fan-in.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qlightning.numerics.quantizer import Quantizer
from qlightning.solvers.lattice import Lattice
from qlightning.solvers.moments import Moments
from qlightning.solvers.solver import SiteSolution

Nearest = Callable[[Tensor, Tensor], Tensor]
"""(values (r, c), indices of their columns (c,)) -> representable values (r, c), float32."""


def damp(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """`hessian` plus `damping` times its mean diagonal, ten times as much as often as it takes to be factored.

    Args:
        hessian: (d, d).
        damping: In units of the mean of the diagonal.

    Returns:
        The sum in float64 (float32 where the device has none), and the damping that was used.
    """
    wide = torch.float32 if hessian.device.type == "mps" else torch.float64
    hessian = hessian.to(wide)
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the inputs' second moments hold NaN or infinity: check the model and the calibration data")
    mean = float(hessian.diagonal().mean())
    identity = torch.eye(hessian.shape[0], dtype=wide, device=hessian.device)
    if not mean > 0:  # nothing ever flowed in: all directions are alike
        return identity, damping
    for _ in range(8):
        damped = hessian + damping * mean * identity
        if not int(torch.linalg.cholesky_ex(damped.flip(0, 1)).info):
            return damped, damping
        damping = max(10 * damping, 1e-6)
    raise ValueError("the inputs' second moments have no Cholesky factor, even damped")


def feedback(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """U (d, d), strictly upper, and D (d,) with (U + I) diag(D) (U + I)^T = `hessian`, which is positive definite."""
    root = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    diagonal = root.diagonal()
    return (root / diagonal).triu(1), diagonal.square()


def sweep(
    weight: Tensor, hessian: Tensor, nearest: Nearest, *, order: Tensor | None = None, block: int = 128
) -> Tensor:
    """Round column after column, feeding errors back.

    Args:
        weight: (r, d).
        hessian: (d, d), positive definite.
        nearest: The grid.
        order: (d,) indices of columns, the first to be rounded first; as they are when not given.
        block: Columns whose errors reach the rest by one matrix product; changes speed, and results by rounding of
            float32 sums only.

    Returns:
        (r, d) float32.
    """
    order = torch.arange(weight.shape[1], device=weight.device) if order is None else order
    upper = feedback(hessian[order][:, order])[0].float()
    w = weight.float()[:, order]
    rounded, error = torch.empty_like(w), torch.zeros_like(w)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        wanted = w[:, start:stop] + error[:, :start] @ upper[:start, start:stop]
        for k in range(start, stop):
            within = error[:, start:k] @ upper[start:k, k]
            rounded[:, k] = nearest((wanted[:, k - start] + within)[:, None], order[k : k + 1])[:, 0]
            error[:, k] = w[:, k] - rounded[:, k]
    result = torch.empty_like(rounded)
    result[:, order] = rounded
    return result


def descend(weight: Tensor, values: Tensor, hessian: Tensor, nearest: Nearest, *, order: Tensor, passes: int) -> Tensor:
    """Coordinate descent on tr(E H E^T): every column in turn becomes the nearest to its best value given the others.

    Ends early at a fixed point. The loss never rises.

    Args:
        weight: (r, d).
        values: (r, d) on the grid, where it starts.
        hessian: (d, d).
        nearest: The grid.
        order: (d,) indices of columns.
        passes: How often all columns are visited, at most.
    """
    values, h = values.clone(), hessian.float()
    for _ in range(passes):
        pull, changed = (values - weight.float()) @ h, False
        for i in order.tolist():
            new = nearest((values[:, i] - pull[:, i] / h[i, i])[:, None], order.new_tensor([i]))[:, 0]
            step = new - values[:, i]
            if bool(step.any()):
                changed = True
                pull += step[:, None] * h[i]
                values[:, i] = new
        if not changed:
            break
    return values


def check_options(solver: str, *, damping: float, order: str, block: int) -> None:
    """Raise ValueError, with the corrected call, for options that `round_by_sweep` does not know."""
    if not damping >= 0 or block < 1 or order not in ("natural", "activation"):
        raise ValueError(
            f"{solver}(damping={damping}, order={order!r}, block={block}): write for example {solver}(damping=0.01, "
            "order='activation', block=128)"
        )


def round_by_sweep(
    weight: Tensor,
    moments: Moments,
    quantizer: Quantizer,
    *,
    damping: float,
    order: str,
    block: int,
    rounding: Callable[[Tensor], Tensor] = torch.round,
    greedy: int = 0,
) -> SiteSolution:
    """Sweep and descend on a quantizer's own grid, for each group of output channels with inputs of its own.

    Args:
        weight: (output channels, fan-in).
        moments: Of its inputs.
        quantizer: With a settled scale; where it works in a basis of its own, so does the sweep.
        damping: See `damp`.
        order: Columns in their "natural" order, or those with the largest inputs first ("activation").
        block: See `sweep`.
        rounding: What rounds between neighbours in the sweep.
        greedy: Passes of coordinate descent after it, to the nearest, on columns by falling diagonal.
    """
    lattice = Lattice(quantizer, weight)
    values, used = torch.empty(weight.shape, dtype=torch.float32, device=weight.device), 0.0
    hessians = lattice.hessians(moments.hessian)
    size = len(weight) // len(hessians)
    for i, hessian in enumerate(hessians):
        rows = slice(i * size, (i + 1) * size)
        damped, damping_used = damp(hessian, damping)
        falling = hessian.diagonal().argsort(descending=True, stable=True)

        def drawn(v: Tensor, columns: Tensor, rows: slice = rows) -> Tensor:
            return lattice.nearest(v, rows, columns, rounding)

        def nearest(v: Tensor, columns: Tensor, rows: slice = rows) -> Tensor:
            return lattice.nearest(v, rows, columns)

        found = sweep(
            lattice.weight[rows], damped, drawn, order=falling if order == "activation" else None, block=block
        )
        values[rows] = descend(lattice.weight[rows], found, damped, nearest, order=falling, passes=greedy)
        used = max(used, damping_used)
    return SiteSolution(lattice.values(values), used)
