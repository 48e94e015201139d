"""A part of a large tensor that stands for the whole, the same one whenever it is asked for."""

import math

from torch import Tensor


def evenly(x: Tensor, at_most: int) -> Tensor:
    """At most so many elements of `x`, flat and evenly spaced; all of them where there are no more.

    The distance between them shares no factor with the size of the last dimension, so that they come from all columns.

    >>> import torch
    >>> evenly(torch.arange(12).view(3, 4), 4)
    tensor([0, 3, 6, 9])
    """
    flat = x.reshape(-1)
    if flat.numel() <= at_most:
        return flat
    stride, columns = -(-flat.numel() // at_most), x.shape[-1]
    while stride < flat.numel() and math.gcd(stride, columns) > 1:
        stride += 1
    return flat[::stride]
