"""A gradient that lets only values near a threshold between two codes move."""

import torch
from torch import Tensor

from qlightning.numerics.formats import Format
from qlightning.numerics.gradients import Gradient


class NearThreshold(Gradient):
    """As another gradient, but 0 for values farther than `boundary` from every threshold between two codes.

    The mask of confidence-guided annealing (OFQ, Liu et al., ICML 2023, arXiv 2302.02210) for what is quantized but is
    no parameter itself, such as a product of two: there its gradient is all that can be held back.

    Args:
        gradient: The other gradient.
        boundary: Distance from a threshold, in gaps between codes, in (0, 0.5); the paper's BR.
    """

    def __init__(self, gradient: Gradient, *, boundary: float = 0.005) -> None:
        if not 0 < boundary < 0.5:
            raise ValueError(f"NearThreshold(boundary={boundary}): in (0, 0.5), for example boundary=0.005")
        self.gradient, self.boundary = gradient, boundary

    def slope(self, v: Tensor, q: Tensor, format: Format) -> Tensor:
        levels = torch.tensor(sorted(set(format.values())), dtype=torch.float32, device=v.device)
        thresholds, reach = (levels[1:] + levels[:-1]) / 2, self.boundary * (levels[1:] - levels[:-1])
        above = torch.bucketize(v, thresholds).clamp_(max=len(thresholds) - 1)
        below = (above - 1).clamp_(min=0)
        near = [(v - thresholds[side]).abs() <= reach[side] for side in (above, below)]
        return self.gradient.slope(v, q, format) * (near[0] | near[1])

    def scale_factor(self, elements: int, format: Format) -> float:
        return self.gradient.scale_factor(elements, format)

    def scale_gradient(self, grad: Tensor, v: Tensor, q: Tensor, slope: Tensor, format: Format) -> Tensor:
        return self.gradient.scale_gradient(grad, v, q, slope, format)  # what is held back keeps its code
