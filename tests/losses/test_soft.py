"""Losses on logits against torch's formulas, their gradients against autograd, and what they keep in memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlightning.losses import KL, SoftCrossEntropy, soft


def naive_kl(student, teacher, temperature):
    log_s, log_t = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1) * temperature**2


def naive_cross_entropy(student, teacher, temperature):
    return F.cross_entropy(
        (student / temperature).flatten(0, -2), (teacher / temperature).softmax(-1).flatten(0, -2), reduction="none"
    ).view(student.shape[:-1]) * (temperature**2)


@pytest.fixture(params=[None, 20], ids=["at-once", "few-tokens-at-once"])
def pieces(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(soft, "_ELEMENTS_AT_ONCE", request.param)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("loss", "naive"), [(KL, naive_kl), (SoftCrossEntropy, naive_cross_entropy)])
def test_value_and_gradient(loss, naive, temperature, pieces):
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 2, 5, 7, generator=generator, dtype=torch.float64) * 3
    student.requires_grad_()
    weights = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    each, expected = loss(temperature=temperature).per_token(student, teacher), naive(student, teacher, temperature)
    assert torch.allclose(each, expected, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad((each * weights).sum(), student)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), student)
    assert torch.allclose(grad, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_student_and_teacher_alike(dtype, pieces):
    logits = (torch.randn(3, 4, 11, generator=torch.Generator().manual_seed(2)) * 5).to(dtype)
    logits[0, 0, 3] = -float("inf")  # a class that both exclude
    student = logits.clone().requires_grad_()
    value = KL(temperature=2.0)(student, logits)
    value.backward()
    assert value.item() == 0
    assert student.grad.count_nonzero() == 0


def test_extremes_stay_what_they_are():
    certain = torch.tensor([[-200.0, 200.0]])
    assert float(KL()(certain, certain)) == 0
    assert float(KL()(-certain, certain)) == 400
    assert torch.isnan(KL()(certain, torch.tensor([[float("nan"), 0.0]])))
    assert torch.isnan(SoftCrossEntropy()(certain, torch.tensor([[float("nan"), 0.0]])))
    assert torch.isnan(KL()(torch.tensor([[float("nan"), 0.0]]), certain))


class Sizes(TorchDispatchMode):
    """Elements of the storage of everything that an operation gave, once for each storage."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for x in [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]:
            self.storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return output


def test_nothing_of_the_size_of_the_logits_is_made_beside_the_gradient(monkeypatch):
    monkeypatch.setattr(soft, "_ELEMENTS_AT_ONCE", 1000)
    student, teacher = torch.randn(2, 100, 1000).unbind()
    student.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        KL().per_token(student, teacher)
    assert {x.data_ptr() for x in saved} == {student.data_ptr(), teacher.data_ptr()}
    with Sizes() as sizes:
        KL()(student, teacher).backward()
    inputs = {x.untyped_storage().data_ptr() for x in (student, teacher)}
    made = sorted(s.nbytes() for pointer, s in sizes.storages.items() if pointer not in inputs)
    assert made[-1] == student.numel() * 4  # the gradient
    assert made[-2] <= 4 * 1000


def test_no_tokens():
    student = torch.randn(0, 3, 5, requires_grad=True)
    assert KL().per_token(student, torch.randn(0, 3, 5)).shape == (0, 3)
