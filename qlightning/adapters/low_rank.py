"""Low-rank updates: weight + scaling * B A."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlightning.adapters.inside import Inside


class LowRank(Inside):
    """weight + sum of scaling * B A over pairs, rounded to the weight's dtype after each, as a merge rounds it.

    The sum is what a merge of the adapters (PEFT's `merge_and_unload`) writes into the weight, bit for bit.

    Args:
        pairs: (A (rank, fan-in), B (output channels, rank), scaling) each.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor, float]]) -> None:
        self.pairs = list(pairs)
        self.scalings = [scaling for _, _, scaling in pairs]

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for a, b, _ in self.pairs for tensor in (a, b))

    def effective(self, matrix: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        with torch.autocast(matrix.device.type, enabled=False):  # a merge happens outside of autocast
            for a, b, scaling in zip(tensors[::2], tensors[1::2], self.scalings, strict=True):
                matrix = (matrix + update(a, b, scaling)).to(matrix.dtype)
        return matrix

    def gradients(self, grad: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        grads: list[Tensor] = []
        for a, b, scaling in zip(tensors[::2], tensors[1::2], self.scalings, strict=True):
            grads += update_gradients(grad, a, b, scaling)
        return tuple(grads)


def update(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """scaling * B A in B's dtype, (output channels, fan-in), with the roundings of PEFT's `get_delta_weight`."""
    if b.device.type == "cpu" and b.dtype in (torch.float16, torch.bfloat16):
        return ((b.float() @ a.float()) * scaling).to(b.dtype)
    return (b @ a) * scaling


def update_gradients(grad: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Gradients of A and B from that of `update`."""
    return (b.t() @ grad.to(b.dtype)) * scaling, (grad.to(a.dtype) @ a.t()) * scaling
