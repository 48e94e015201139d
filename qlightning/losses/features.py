"""Losses on features: hidden states, block outputs, anything whose last dimension is what is compared."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from qlightning.losses.loss import Comparison, Reduction, wide

Normalize = Literal["none", "length", "moments"]
"""What is done to each token's features first: "length" divides them by their Euclidean length; "moments" takes their
mean away and divides by their standard deviation."""


class MSE(Comparison):
    """Mean squared difference of the features.

    >>> import torch
    >>> MSE()(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
    tensor(2.)

    Args:
        normalize: "none" compares the features as they are, "length" their directions, "moments" what is left of them
            without mean and standard deviation.
        reduction: "tokens" for the mean over tokens; "batch" for the sum over tokens divided by the batch size.
    """

    def __init__(self, *, normalize: Normalize = "none", reduction: Reduction = "tokens") -> None:
        super().__init__(reduction=reduction)
        if normalize not in ("none", "length", "moments"):
            raise ValueError(f"MSE(normalize={normalize!r}): write normalize='none', 'length' or 'moments'")
        self.normalize = normalize

    def per_token(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (self._normalized(student) - self._normalized(teacher)).square().mean(-1)

    def _normalized(self, x: Tensor) -> Tensor:
        x = wide(x)
        if self.normalize == "length":
            return F.normalize(x, dim=-1)
        return F.layer_norm(x, x.shape[-1:]) if self.normalize == "moments" else x


class Cosine(Comparison):
    """One minus the cosine of the angle between the features: 0 for equal directions, 2 for opposite ones.

    Half the squared distance of the two directions, which is the same and exactly 0 for equal features.

    Args:
        reduction: "tokens" for the mean over tokens; "batch" for the sum over tokens divided by the batch size.
    """

    def per_token(self, student: Tensor, teacher: Tensor) -> Tensor:
        directions = (F.normalize(wide(x), dim=-1) for x in (student, teacher))
        return (next(directions) - next(directions)).square().sum(-1) / 2
