"""Losses on logits: how far a student's distribution over the vocabulary is from a teacher's.

Hinton et al. 2015 (arXiv 1503.02531): both distributions are softened by a temperature T, and the loss is multiplied by
T^2, so that its gradients keep their size. Logits of a language model are the largest tensors of a step. So neither
forward nor backward makes another of their size beside the gradient itself: both work on a few tokens at a time, in
float32, and backward computes the softmax anew.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from qlightning.losses.loss import Comparison, Reduction, wide

_ELEMENTS_AT_ONCE = 2**22  # 16 MiB of float32 for each of the few temporaries


class OnLogits(Comparison, ABC):
    """A loss on logits, whose last dimension are classes.

    Args:
        temperature: What both logits are divided by, T; the loss is multiplied by T^2.
        reduction: "tokens" or "batch".
    """

    def __init__(self, *, temperature: float = 1.0, reduction: Reduction = "tokens") -> None:
        super().__init__(reduction=reduction)
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: above 0, for example {type(self).__name__}(temperature=1.0)")
        self.temperature = temperature

    @abstractmethod
    def term(self, p_teacher: Tensor, log_teacher: Tensor, log_student: Tensor) -> Tensor:
        """What a class adds to a token's loss; its slope to `log_student` must be -p_teacher. All (tokens, classes)."""

    def per_token(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape[-1] < 2:
            raise ValueError(
                f"{tuple(student.shape)} are logits of a single class, which are always alike; where the task computes "
                "its loss in pieces, so must distillation: DistillationCallback(..., chunked_loss=1024)"
            )
        losses: Tensor = _Divergence.apply(student.flatten(0, -2), teacher.flatten(0, -2), self)
        return losses.view(student.shape[:-1])


class KL(OnLogits):
    """Kullback-Leibler divergence of the student from the teacher, in nats: exactly 0 where both have the same logits.

    >>> KL()(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]))
    tensor(0.)

    Args:
        temperature: What both logits are divided by, T; the loss is multiplied by T^2.
        reduction: "tokens" for the mean over tokens; "batch" for the sum over tokens divided by the batch size.
    """

    def term(self, p_teacher: Tensor, log_teacher: Tensor, log_student: Tensor) -> Tensor:
        # 0 * (-inf - ...) of a class that the teacher excludes is nothing
        return torch.where(p_teacher == 0, 0.0, p_teacher * (log_teacher - log_student))


class SoftCrossEntropy(OnLogits):
    """Cross-entropy against the teacher's distribution, in nats: the divergence plus the teacher's entropy.

    Its gradient is that of `KL`; its value is not zero for equal logits.

    Args:
        temperature: What both logits are divided by, T; the loss is multiplied by T^2.
        reduction: "tokens" for the mean over tokens; "batch" for the sum over tokens divided by the batch size.
    """

    def term(self, p_teacher: Tensor, log_teacher: Tensor, log_student: Tensor) -> Tensor:
        return torch.where(p_teacher == 0, 0.0, -p_teacher * log_student)


class _Divergence(torch.autograd.Function):
    """(tokens, classes) twice to (tokens,); saves the two tensors it was given and nothing else."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, loss: OnLogits) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.temperature = loss.temperature
        pieces = [
            loss.term(log_t.exp(), log_t, log_s).sum(-1).mul_(loss.temperature**2)
            for log_s, log_t in _log_softmaxes(student, teacher, loss.temperature)
        ]
        return torch.cat(pieces) if pieces else wide(student).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        student, teacher = ctx.saved_tensors
        grad_student, start = torch.empty_like(student), 0
        for log_s, log_t in _log_softmaxes(student, teacher, ctx.temperature):
            rows = slice(start, start + len(log_s))
            difference = log_s.exp_().sub_(log_t.exp_())
            grad_student[rows] = difference.mul_(grad[rows, None] * ctx.temperature)
            start = rows.stop
        return grad_student, None, None


def _log_softmaxes(student: Tensor, teacher: Tensor, temperature: float) -> Any:
    rows = max(1, _ELEMENTS_AT_ONCE // max(1, student.shape[-1]))
    if len(student):
        for s, t in zip(student.split(rows), teacher.split(rows), strict=True):
            yield tuple((wide(part) / temperature).log_softmax(-1) for part in (s, t))
