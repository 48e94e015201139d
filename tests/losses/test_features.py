"""Losses on features against torch's, with gradients by autograd of torch's formula."""

import pytest
import torch
import torch.nn.functional as F

from qlightning.losses import MSE, Cosine


def pair():
    student, teacher = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return student.requires_grad_(), teacher


@pytest.mark.parametrize(
    ("loss", "naive"),
    [
        (MSE(), lambda s, t: F.mse_loss(s, t)),
        (
            MSE(normalize="length"),
            lambda s, t: F.mse_loss(s / s.norm(dim=-1)[..., None], t / t.norm(dim=-1)[..., None]),
        ),
        (MSE(normalize="moments"), lambda s, t: F.mse_loss(F.layer_norm(s, (6,)), F.layer_norm(t, (6,)))),
        (Cosine(), lambda s, t: (1 - F.cosine_similarity(s, t, dim=-1)).mean()),
    ],
    ids=["mse", "length", "moments", "cosine"],
)
def test_against_torch(loss, naive):
    student, teacher = pair()
    value, expected = loss(student, teacher), naive(student, teacher)
    assert torch.allclose(value, expected, rtol=1e-12)
    (grad,), (wanted,) = (torch.autograd.grad(one, student) for one in (value, expected))
    assert torch.allclose(grad, wanted, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("loss", [MSE(), MSE(normalize="length"), MSE(normalize="moments"), Cosine()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_student_and_teacher_alike(loss, dtype):
    teacher = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    teacher[0] = 0
    student = teacher.clone().requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.item() == 0
    assert student.grad.count_nonzero() == 0


def test_what_normalization_takes_away():
    student, teacher = (x.detach() for x in pair())
    assert float(MSE(normalize="length")(3 * student, student)) < 1e-30
    assert float(MSE(normalize="moments")(3 * student + 2, student)) < 1e-8  # torch's epsilon beside the variance
    assert float(Cosine()(3 * student, student)) < 1e-30
    assert float(Cosine()(-student, student)) == pytest.approx(2)
    assert float(MSE(normalize="length")(student, teacher)) > 0.1
