"""Clipping of a weight, block by block of its granularity, for the smallest error of the layer's outputs.

Shapes: o output channels, d fan-in, k blocks in a row of n columns each.
"""

import torch
from torch import Tensor

from qlightning.numerics.quantizer import Quantizer
from qlightning.solvers.commit import rounded


@torch.no_grad()
def clip_for_outputs(
    weight: Tensor, hessian: Tensor, quantizer: Quantizer, *, shrink: float = 0.5, steps: int = 20
) -> Tensor:
    """The weight, each block clamped to the share of its largest magnitude at which its part of the output errs least.

    Shares 1, 1 - 1 / steps, ... above 1 - shrink are tried. The error of a block is what rounding the clamped weight
    changes in the product of just this block with its inputs. The quantizer's scale is settled on the result.

    Args:
        weight: (o, d).
        hessian: (d, d) mean x x^T of the inputs.
        quantizer: The layer's, with a scale that is state.
        shrink: Largest share by which a block is clipped; 0 for none.
        steps: Number of steps from no clipping to nothing left.

    Raises:
        ValueError: Blocks span rows (see `rowwise`), or the quantizer works in a basis of its own.
    """
    if quantizer.transform is not None or not rowwise(quantizer, weight):
        raise ValueError(f"{quantizer!r} does not round pieces of rows one by one: write weight='int4-g128'")
    granularity = quantizer.granularity
    original = _pieces(granularity.view(weight).float(), weight)
    columns = _pieces(granularity.view(torch.arange(weight.shape[1], device=weight.device).expand_as(weight)), weight)
    gram_knn = hessian[columns[0, :, :, None], columns[0, :, None, :]].float()
    largest, best_okn = original.abs().amax(-1, keepdim=True), original.clone()
    least = torch.full_like(largest, float("inf"))
    for i in range(max(1, round(shrink * steps))):
        bound = largest * (1 - i / steps)
        clamped = torch.minimum(torch.maximum(original, -bound), bound)
        trial = granularity.unview(clamped.reshape(granularity.view(weight).shape), weight.shape).to(weight.dtype)
        quantizer.initialize(trial)
        change_kon = (_pieces(granularity.view(rounded(quantizer, trial)).float(), weight) - original).transpose(0, 1)
        error = ((change_kon @ gram_knn) * change_kon).sum(-1, keepdim=True).transpose(0, 1)
        better = error < least
        least, best_okn = torch.where(better, error, least), torch.where(better, clamped, best_okn)
    best = granularity.unview(best_okn.reshape(granularity.view(weight).shape), weight.shape).to(weight.dtype)
    quantizer.initialize(best)
    return best


def rowwise(quantizer: Quantizer, weight: Tensor) -> bool:
    """Whether elements that share a scale lie in one row, and in all rows alike."""
    rows, columns = len(weight), weight.shape[1]
    places = torch.arange(weight.numel(), device=weight.device).view(weight.shape)
    blocks = quantizer.granularity.view(places)
    if columns % blocks.shape[-1]:
        return False
    pieces = _pieces(blocks, weight) - torch.arange(rows, device=weight.device)[:, None, None] * columns
    return bool((pieces == pieces[:1]).all() and (pieces >= 0).all() and (pieces < columns).all())


def _pieces(blocks: Tensor, weight: Tensor) -> Tensor:
    """(o, k, n)."""
    return blocks.reshape(len(weight), -1, blocks.shape[-1])
