"""QuIP: 2-bit quantization of large language models with guarantees."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from qlightning.numerics.formats import Int
from qlightning.numerics.quantizer import Quantizer
from qlightning.solvers.incoherence import Incoherence
from qlightning.solvers.lattice import in_basis
from qlightning.solvers.moments import Moments
from qlightning.solvers.solver import SiteSolution, SiteSolver, StreamName
from qlightning.solvers.sweep import damp, descend, sweep


class QuIP(SiteSolver):
    """Chee et al., NeurIPS 2023, arXiv 2307.13304: LDLQ in a basis in which neither weights nor inputs stick out.

    The weight is rescaled by input channel, rotated on both sides by random orthogonal maps, and rounded by LDLQ (and
    greedy passes) on one uniform grid of 2^bits levels in +-`rho` root mean squares. Rotated back, its values lie on no
    grid of the layer's own quantizer, which therefore is switched off for good: what QuIP gives is a finished model
    (`commit` cannot be "residual"), and training it with its own quantizer would round it once more. The report holds
    what such a weight is stored as (codes, scale, channel scales, seed); `rebuild` makes the weight of it.

    The number of bits is that of the quantizer's integer format; its granularity and scale do not matter. Constants
    that the paper leaves open (the 1e-2 on the diagonal, clamps of the rescaling) are the released code's.

    Args:
        greedy: Passes of coordinate descent after LDLQ; the released code's default is 1.
        rho: Half width of the grid in root mean squares of the rotated weight.
        damping: Added to the rotated Hessian's diagonal, in units of its mean.
        rescale: Balance input channels between weight and Hessian before the rotation ("balanced"), or not ("none").
        stream: Whose activations the moments are of.
        refresh: How often they are taken; the paper's are taken once per block.
        batches: Number of batches of calibration data; the paper has 128 sequences of 2048 tokens.
        seed: Of all random numbers.
    """

    final = True

    def __init__(
        self,
        *,
        greedy: int = 1,
        rho: float = 2.4,
        damping: float = 0.01,
        rescale: Literal["balanced", "none"] = "balanced",
        stream: StreamName = "q",
        refresh: Literal["group", "block"] = "block",
        batches: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(stream=stream, refresh=refresh, commit="values", batches=batches, seed=seed)
        if greedy < 0 or not rho > 0 or not damping >= 0 or rescale not in ("balanced", "none"):
            raise ValueError(
                f"QuIP(greedy={greedy}, rho={rho}, damping={damping}, rescale={rescale!r}): write for example "
                "QuIP(greedy=1, rho=2.4, damping=0.01)"
            )
        self.greedy, self.rho, self.damping, self.rescale = greedy, rho, damping, rescale

    def solve(
        self, weight: Tensor, moments: Moments, *, quantizer: Quantizer, generator: torch.Generator
    ) -> SiteSolution:
        if not isinstance(quantizer.format, Int):
            raise ValueError(f"QuIP rounds to integers, not to {quantizer.format!r}: write for example weight='int2'")
        hessians = moments.hessian
        size = len(weight) // len(hessians)
        found = [
            self._solve_group(weight[i * size : (i + 1) * size], hessian, quantizer.format.bits, _draw_seed(generator))
            for i, hessian in enumerate(hessians)
        ]
        state = {name: torch.stack([group[name] for group, _ in found]) for name in found[0][0]}
        return SiteSolution(rebuild(state), max(damping for _, damping in found), on_grid=False, state=state)

    def _solve_group(self, weight: Tensor, hessian: Tensor, bits: int, seed: int) -> tuple[dict[str, Tensor], float]:
        wide = weight.to(hessian)
        balance = self._balance(wide, hessian)
        basis = Incoherence(seed=seed)
        w = basis(wide * balance).float()
        damped, damping = damp(rotated_hessian(hessian / balance / balance[:, None], basis), self.damping)
        scale = self.rho * w.square().mean().sqrt()
        levels = 2**bits - 1

        def nearest(v: Tensor, _: Tensor) -> Tensor:
            return (torch.round((v / scale + 1) / 2 * levels).clamp_(0, levels) * 2 / levels - 1) * scale

        order = damped.diagonal().argsort(descending=True, stable=True)
        rounded = sweep(w, damped, nearest, order=order if self.greedy else None)
        rounded = descend(w, rounded, damped, nearest, order=order, passes=self.greedy)
        codes = torch.round((rounded / scale + 1) / 2 * levels).to(torch.int32)
        dtype = torch.uint8 if bits <= 8 else torch.int32
        state = {
            "codes": codes.to(dtype),
            "scale": scale,
            "balance": balance.float(),
            "levels": scale.new_tensor(levels),
            "seed": torch.tensor(seed),
        }
        return state, damping

    def _balance(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """(d,) factors that make the diagonals of H and of W^T W alike."""
        if self.rescale == "none":
            return torch.ones_like(hessian.diagonal())
        peak = hessian.abs().max()
        inputs = (hessian.diagonal() / (peak if bool(peak > 0) else 1.0)).clamp(min=1e-8)
        return (inputs / weight.square().sum(0).clamp(min=1e-8)).sqrt().sqrt()


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (1,), generator=generator))


def rotated_hessian(hessian: Tensor, basis: Incoherence) -> Tensor:
    """V H V^T of H scaled to mean diagonal 1, plus 1e-2 on the diagonal."""
    mean = hessian.diagonal().mean()
    scaled = hessian / (mean if bool(mean > 0) else 1.0)
    return in_basis(basis, scaled) + 1e-2 * torch.eye(len(hessian)).to(hessian)


def rebuild(state: Mapping[str, Tensor]) -> Tensor:
    """The weight (float32) that `SiteSolution.state` of a QuIP solution stands for."""
    values = []
    for codes, scale, balance, levels, seed in zip(*(state[name] for name in _STATE), strict=True):
        rounded = (codes.double() * 2 / levels - 1) * scale.double()
        values.append(Incoherence(seed=int(seed)).inverse(rounded) / balance.double())
    return torch.cat(values).float()


_STATE = ("codes", "scale", "balance", "levels", "seed")
