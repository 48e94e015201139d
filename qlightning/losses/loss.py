"""What losses on tensors share: a number per token, and how tokens become one number.

Tensors are (..., features): what stands before the last dimension are tokens, the first dimension is the batch.
Everything is computed in float32, or in the tensors' own dtype where that is wider.
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from qlightning.numerics.part import Part

Reduction = Literal["tokens", "batch"]
"""How tokens become one number: "tokens" is their mean; "batch" is their sum divided by the batch size (what torch's
reduction="batchmean" gives), which grows with the length of the sequences."""


class Comparison(Part, ABC):
    """A loss that says how far a student's tensor is from a teacher's.

    Args:
        reduction: "tokens" for the mean over tokens, "batch" for the sum over tokens divided by the batch size.
    """

    def __init__(self, *, reduction: Reduction = "tokens") -> None:
        check_reduction(self, reduction, ("tokens", "batch"))
        self.reduction = reduction

    @abstractmethod
    def per_token(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of each token: (..., features) twice to (...). The teacher's gets no gradient."""

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            student: Shape (..., features).
            teacher: The same shape.
            mask: Which tokens count, shape (...) of bool or of 0 and 1; all when left out.

        Raises:
            ValueError: The shapes differ.
        """
        if student.shape != teacher.shape:
            raise ValueError(f"the student's is {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}")
        return self.reduce(self.per_token(student, teacher.detach()), mask)

    def reduce(self, losses: Tensor, mask: Tensor | None = None) -> Tensor:
        """One number from the losses of tokens, (...), of which a mask of that shape says which count."""
        if mask is not None:
            if mask.shape != losses.shape:
                raise ValueError(f"the mask is {tuple(mask.shape)} and the tokens are {tuple(losses.shape)}")
            # where, not times: what a masked token holds may be infinite
            losses = torch.where(mask.bool(), losses, 0.0)
        if self.reduction == "batch":
            return losses.sum() / (len(losses) if losses.ndim else 1)
        return losses.sum() / (losses.numel() if mask is None else mask.bool().sum().clamp(min=1))

    __call__ = forward


class Penalty(Part, ABC):
    """A loss that asks something of one tensor.

    Args:
        reduction: "sum" over tokens (of the process at hand), or their mean, "tokens".
    """

    def __init__(self, *, reduction: Literal["sum", "tokens"]) -> None:
        check_reduction(self, reduction, ("sum", "tokens"))
        self.reduction = reduction

    @abstractmethod
    def per_token(self, y: Tensor) -> Tensor:
        """The penalty of each token: (..., features) to (...)."""

    def forward(self, y: Tensor) -> Tensor:
        """(..., features) to one number."""
        values = self.per_token(y)
        return values.sum() if self.reduction == "sum" else values.mean()

    __call__ = forward


def check_reduction(loss: Part, reduction: str, known: tuple[str, ...]) -> None:
    """Raise ValueError unless `reduction` is one of the known ones."""
    if reduction not in known:
        right = " or ".join(f"reduction={name!r}" for name in known)
        raise ValueError(f"{type(loss).__name__}(reduction={reduction!r}): write {right}")


def wide(x: Tensor) -> Tensor:
    """float32 where x is narrower, x itself where it is not."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
