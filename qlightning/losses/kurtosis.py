"""Kurtosis: how much of a token's energy sits in a few features. 3 for a normal distribution, 1.8 for a uniform one."""

from typing import Any, Literal

import torch
from torch import Tensor

from qlightning.losses.loss import Penalty, wide


class Kurtosis(Penalty):
    """mean((y - mean y)^4) / (var(y)^2 + eps) over the features of each token, summed or averaged over tokens.

    Nrusimha et al. 2024 (arXiv 2404.03605) penalise it on outputs of linear layers (that they sum
    over tokens is second-hand).
    In float32 whatever the dtype of y; backward saves y and nothing else. The features must lie on one device: under
    tensor parallelism each device would take the kurtosis of its own share.

    >>> Kurtosis()(torch.tensor([[1.0, -1.0, -1.0, 1.0]]))
    tensor(1.)

    Args:
        reduction: "sum" over tokens (of the process at hand), or their mean, "tokens", which does not depend on batch
            size and length.
        eps: Keeps a token without variance finite: its kurtosis is 0.
    """

    def __init__(self, *, reduction: Literal["sum", "tokens"] = "sum", eps: float = 1e-12) -> None:
        super().__init__(reduction=reduction)
        if not eps > 0:
            raise ValueError(f"Kurtosis(eps={eps}): above 0, for example Kurtosis(eps=1e-12)")
        self.eps = eps

    def per_token(self, y: Tensor) -> Tensor:
        return _Kurtosis.apply(y, self.eps)  # type: ignore[no-any-return]


class _Kurtosis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(y)
        ctx.eps = eps
        square = _centred(y).square_()
        return square.square().mean(-1) / (square.mean(-1).square() + eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """4/n (c^3 - mean c^3 - m4 var c / d) / d with c = y - mean y, m4 = mean c^4 and d = var^2 + eps."""
        (y,) = ctx.saved_tensors
        c = _centred(y)
        square = c.square()
        variance, m4 = square.mean(-1, keepdim=True), square.square().mean(-1, keepdim=True)
        d = variance.square() + ctx.eps
        cube = square.mul_(c)
        cube -= cube.mean(-1, keepdim=True)
        slope = cube.sub_(c.mul_(m4 * variance / d)).mul_(4 / y.shape[-1] * grad.unsqueeze(-1) / d)
        return slope.to(y.dtype), None


def _centred(y: Tensor) -> Tensor:
    y = wide(y)
    return y - y.mean(-1, keepdim=True)
