"""Tokens become one number as the reduction says; masks leave tokens out; what is wrong is said."""

import pytest
import torch

from qlightning.losses import KL, MSE, Cosine, Kurtosis, SoftCrossEntropy

COMPARISONS = [KL(), KL(temperature=2.0), SoftCrossEntropy(), MSE(), MSE(normalize="length"), Cosine()]


def pair(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=dtype)
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("loss", COMPARISONS, ids=repr)
def test_reductions(loss):
    student, teacher = pair(2, 3, 5)
    each = loss.per_token(student, teacher)
    assert each.shape == (2, 3)
    assert torch.allclose(loss(student, teacher), each.mean())
    whole = type(loss)(**{**loss.arguments(), "reduction": "batch"})
    assert torch.allclose(whole(student, teacher), each.sum() / 2)


@pytest.mark.parametrize("loss", COMPARISONS, ids=repr)
def test_a_mask_leaves_tokens_out(loss):
    student, teacher = pair(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    with torch.no_grad():
        teacher[1, 2] = float("inf")  # what is masked may hold anything
    value = loss(student, teacher, mask)
    kept = mask.bool()
    assert torch.allclose(value, loss(student[kept], teacher[kept]))
    whole = type(loss)(**{**loss.arguments(), "reduction": "batch"})
    assert torch.allclose(whole(student, teacher, mask), loss.per_token(student[kept], teacher[kept]).sum() / 2)


def test_nothing_but_masked_tokens_is_zero():
    student, teacher = pair(2, 3)
    assert MSE()(student, teacher, torch.zeros(2)).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    student, teacher = pair(4, 64, dtype=dtype)
    for loss in COMPARISONS:
        low, high = loss(student, teacher), loss(student.float(), teacher.float())
        assert low.dtype == torch.float32
        assert torch.equal(low, high)
        (grad,) = torch.autograd.grad(low, student)
        assert grad.dtype == dtype


def test_the_teacher_gets_no_gradient():
    student, teacher = pair(2, 3)
    teacher.requires_grad_()
    for loss in COMPARISONS:
        loss(student, teacher).backward()
    assert teacher.grad is None


def test_parts_say_what_they_are():
    assert repr(KL(temperature=2.0)) == "KL(temperature=2.0)"
    assert MSE(normalize="length") == MSE(normalize="length") != MSE()
    assert repr(Kurtosis(reduction="tokens")) == "Kurtosis(reduction='tokens')"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KL(reduction="mean"), r"KL\(reduction='mean'\): write reduction='tokens' or reduction='batch'"),
        (lambda: Kurtosis(reduction="batch"), r"write reduction='sum' or reduction='tokens'"),
        (lambda: KL(temperature=0.0), r"KL\(temperature=1.0\)"),
        (lambda: MSE(normalize="l2"), r"normalize='none', 'length' or 'moments'"),
        (lambda: Kurtosis(eps=0.0), r"Kurtosis\(eps=1e-12\)"),
        (lambda: MSE()(torch.ones(2, 3), torch.ones(2, 4)), r"student's is \(2, 3\) and the teacher's \(2, 4\)"),
        (lambda: MSE()(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3)), r"mask is \(3,\) and the tokens are \(2,\)"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
