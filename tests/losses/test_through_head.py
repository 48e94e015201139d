"""Losses through heads beside the same losses on stored logits, and what each keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlightning import convert
from qlightning.losses import KL, SoftCrossEntropy, compare_through_heads, cross_entropy_through_head

WORDS, FEATURES, TOKENS = 96, 16, 40


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes, other than the head's weight and its gradient."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) not in ((WORDS, FEATURES), (FEATURES, WORDS)):
                self.most = max(self.most, tensor.numel())
        return made


def parts(quantized: bool, dtype=torch.float64):
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(FEATURES, WORDS, dtype=dtype))
    if quantized:
        convert(holder, {"0": {"weight": "int4-g8", "input": "int8-token"}})
    teacher_head = nn.Linear(24, WORDS, dtype=dtype)
    hidden = torch.randn(2, TOKENS // 2, FEATURES, dtype=dtype, requires_grad=True)
    return holder[0], teacher_head, hidden, torch.randn(2, TOKENS // 2, 24, dtype=dtype)


def gradients(loss, *leaves):
    grads = torch.autograd.grad(loss, leaves)
    return [loss.detach(), *grads]


@pytest.mark.parametrize("tokens", [7, 40, 1000])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("loss", [KL(temperature=2.0), SoftCrossEntropy(), KL(reduction="batch")], ids=str)
def test_a_comparison_is_that_of_stored_logits(loss, quantized, tokens) -> None:
    head, teacher_head, hidden, theirs = parts(quantized)
    mask = torch.rand(2, TOKENS // 2) > 0.3
    leaves = hidden, head.weight, head.bias
    through = compare_through_heads(
        loss, hidden, theirs, head=head, teacher_head=teacher_head, mask=mask, tokens=tokens
    )
    stored = loss(head(hidden), teacher_head(theirs), mask)
    for one, other in zip(gradients(through, *leaves), gradients(stored, *leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert teacher_head.weight.grad is None


@pytest.mark.parametrize("tokens", [7, 1000])
def test_cross_entropy_is_that_of_stored_logits(tokens) -> None:
    head, _, hidden, _ = parts(False)
    labels = torch.randint(WORDS, (2, TOKENS // 2))
    labels[0, :3] = -100
    through = cross_entropy_through_head(hidden, head, labels, tokens=tokens)
    stored = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    assert through.shape == labels.shape
    torch.testing.assert_close(through, stored, rtol=1e-10, atol=1e-12)
    leaves = hidden, head.weight, head.bias
    for one, other in zip(gradients(through.sum(), *leaves), gradients(stored.sum(), *leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(cross_entropy_through_head(hidden, head, labels, tokens=tokens), through)


def test_logits_of_all_tokens_are_never_in_memory() -> None:
    head, teacher_head, hidden, theirs = parts(False)
    with Largest() as through:
        heads = {"head": head, "teacher_head": teacher_head}
        compare_through_heads(KL(), hidden, theirs, **heads, tokens=8).backward()
    with Largest() as stored:
        KL()(head(hidden), teacher_head(theirs)).backward()
    assert stored.most == TOKENS * WORDS
    assert through.most == max(8 * WORDS, 24 * WORDS, TOKENS * 24)  # the teacher's weight, transposed


def test_what_is_kept_are_the_hidden_states() -> None:
    head, teacher_head, hidden, theirs = parts(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        compare_through_heads(KL(), hidden, theirs, head=head, teacher_head=teacher_head, tokens=8)
    assert all(WORDS not in tensor.shape for tensor in kept)


def test_words_are_checked() -> None:
    head, teacher_head, hidden, theirs = parts(False)
    with pytest.raises(ValueError, match="at least 1"):
        cross_entropy_through_head(hidden, head, torch.zeros(2, TOKENS // 2, dtype=torch.int64), tokens=0)
    with pytest.raises(ValueError, match="labels"):
        cross_entropy_through_head(hidden, head, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="the teacher's"):
        compare_through_heads(KL(), hidden, theirs[:1], head=head, teacher_head=teacher_head)
    with pytest.raises(ValueError, match="96 words and the teacher 16"):
        compare_through_heads(KL(), hidden, theirs, head=head, teacher_head=nn.Linear(24, 16, dtype=theirs.dtype))
