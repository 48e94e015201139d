"""Losses on logits that are never stored: a few tokens go through the head at a time, and again in backward.

Logits of a language model are the largest tensors of a step: at 8192 tokens and 128 thousand words 2 GiB in bfloat16
for the student, as much for its teacher, and twice that in float32. Here only the hidden states are kept. Backward
computes the logits of each piece anew, one more product with the head's weight.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlightning.losses.loss import Comparison, wide

Head = Callable[[Tensor], Tensor]
"""Hidden states (tokens, features) to logits (tokens, words): a module, quantized or not, or a function of one."""


def cross_entropy_through_head(hidden: Tensor, head: Head, labels: Tensor, *, tokens: int = 1024) -> Tensor:
    """Cross-entropy of each token in nats, float32 and of the labels' shape, as that of `head(hidden)`.

    Args:
        hidden: What the head sees, (..., features).
        head: The output layer.
        labels: (...) of int64; a token of label -100 has loss 0.
        tokens: How many tokens' logits are in memory at once.

    Raises:
        ValueError: The shapes do not fit, or `tokens` is not positive.
    """
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(f"hidden states are {tuple(hidden.shape)} and labels {tuple(labels.shape)}")

    def piece(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(wide(head(hidden)), labels, reduction="none")

    return _in_pieces(piece, tokens, hidden.flatten(0, -2), labels.flatten()).view(labels.shape)


def compare_through_heads(
    loss: Comparison,
    student: Tensor,
    teacher: Tensor,
    *,
    head: Head,
    teacher_head: Head,
    mask: Tensor | None = None,
    tokens: int = 1024,
) -> Tensor:
    """`loss(head(student), teacher_head(teacher), mask)`, for a loss such as `KL` that has a value per token.

    Args:
        loss: What compares logits.
        student: What the student's head sees, (..., features).
        teacher: What the teacher's head sees, (..., features); it gets no gradient, nor does its head.
        head: The student's output layer.
        teacher_head: The teacher's.
        mask: Which tokens count, (...).
        tokens: How many tokens' logits are in memory at once.

    Raises:
        ValueError: The shapes do not fit, or `tokens` is not positive.
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"hidden states are {tuple(student.shape)}, and the teacher's {tuple(teacher.shape)}")

    def piece(student: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher_head(teacher)
        said = head(student)
        if said.shape != wanted.shape:
            raise ValueError(f"the student has {said.shape[-1]} words and the teacher {wanted.shape[-1]}")
        return loss.per_token(said, wanted)

    flat = student.flatten(0, -2), teacher.detach().flatten(0, -2)
    return loss.reduce(_in_pieces(piece, tokens, *flat).view(student.shape[:-1]), mask)


def _in_pieces(piece: Callable[[Tensor, Tensor], Tensor], tokens: int, *rows: Tensor) -> Tensor:
    """`piece` of a few rows at a time, of which nothing but its arguments is kept for backward."""
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: at least 1, for example tokens=1024")
    parts = zip(*(tensor.split(tokens) for tensor in rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([piece(*part) for part in parts])
    return torch.cat([checkpoint(piece, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])
