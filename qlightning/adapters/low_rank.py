"""Low-rank updates: weight + scaling * B A."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlightning.adapters.inside import Inside


class LowRank(Inside):
    """weight + sum of scaling * B A over pairs, rounded to the weight's dtype as a merge rounds it.

    The sum is what a merge of the adapter (PEFT's `merge_and_unload`) writes into the weight, bit for bit.

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
                matrix = matrix + ((b @ a) * scaling).to(matrix.dtype)
        return matrix

    def gradients(self, grad: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        grads: list[Tensor] = []
        for a, b, scaling in zip(tensors[::2], tensors[1::2], self.scalings, strict=True):
            grads += [(b.t() @ grad.to(b.dtype)) * scaling, (grad.to(a.dtype) @ a.t()) * scaling]
        return tuple(grads)
