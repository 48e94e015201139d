"""The contract of rules inside a quantizer: `gradients` is the adjoint of `effective`."""

import pytest
import torch

from qlightning.adapters import Inside, LowRank
from qlightning.adapters.lora import Update

A, B = torch.randn(2, 8), torch.randn(6, 2)
RULES = [LowRank([(A, B, 0.5), (A * 2, B + 1, -1.0)]), Update(A, B, 0.5, torch.float32, None, False)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_gradients_are_those_of_autograd(rule: Inside) -> None:
    matrix, grad = torch.randn(6, 8), torch.randn(6, 8)
    tensors = [tensor.clone().requires_grad_() for tensor in rule.tensors()]
    expected = torch.autograd.grad(rule.effective(matrix, tensors), tensors, grad)
    for ours, theirs in zip(rule.gradients(grad, tensors), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_is_abstract() -> None:
    with pytest.raises(TypeError):
        Inside()
