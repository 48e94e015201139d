"""Hadamard rotations: they spread what is large in one feature over many, so that a shared step suits all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlightning.numerics.hadamard import check_block, hadamard, largest_block
from qlightning.numerics.transform import Basis


class Hadamard(Basis):
    """x H, with H the orthonormal Walsh-Hadamard matrix, block-diagonal where the features are no power of two.

    As a layer's transform (`Scheme(transform=Hadamard())`) it rotates the input and nothing else: the weight is trained
    in the rotated basis, as in BitNet v2 (arXiv 2504.18415), and a weight trained without it becomes another function.
    For a model that is trained already, give it to both quantizers instead, `Quantizer(..., transform=Hadamard())` as
    weight and as input: the function stays what it was, up to rounding.

    Args:
        block: Features that are mixed with each other, a power of two that divides them; the largest when not given.

    Attributes:
        size: As a layer's transform, the block size as int64 (1,): a checkpoint says it also where `block` is None.
    """

    def __init__(self, block: int | None = None) -> None:
        super().__init__()
        if block is not None:
            check_block(block, block)
        self.block = block

    def build(self, matrix: Tensor, features: int) -> None:
        block = largest_block(features) if self.block is None else self.block
        check_block(block, features)
        self.register_buffer("size", torch.tensor([block]))

    def forward(self, x: Tensor) -> Tensor:
        return hadamard(x, self.block)

    def inverse(self, x: Tensor) -> Tensor:
        return hadamard(x, self.block)


class RandomHadamard(Basis):
    """(x * signs) H in blocks: a fixed random flip of signs keeps H from lining up with structure in x.

    >>> RandomHadamard(4, signs=[1, -1, 1, 1])(torch.tensor([2.0, 0.0, 0.0, 0.0]))
    tensor([1., 1., 1., 1.])

    Args:
        block: Features that are mixed with each other, a power of two that divides them.
        signs: +1 or -1 for each feature of a block, the same in every block; drawn from `seed` when not given.
        seed: Seed of the signs.
    """

    def __init__(self, block: int = 16, *, signs: Sequence[int] | None = None, seed: int = 0) -> None:
        super().__init__()
        check_block(block, block)
        self.block, self.seed = block, seed
        self.signs = None if signs is None else tuple(int(sign) for sign in signs)
        if self.signs is not None and (len(self.signs) != block or set(self.signs) - {1, -1}):
            raise ValueError(f"signs={signs!r}: write {block} numbers that are 1 or -1, one per feature of a block")
        drawn = torch.randint(2, (block,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
        self._signs: list[int] = list(self.signs) if self.signs is not None else drawn.tolist()

    def build(self, matrix: Tensor, features: int) -> None:
        check_block(self.block, features)

    def forward(self, x: Tensor) -> Tensor:
        return hadamard(self._flip(x), self.block)

    def inverse(self, x: Tensor) -> Tensor:
        return self._flip(hadamard(x, self.block))

    def _flip(self, x: Tensor) -> Tensor:
        check_block(self.block, x.shape[-1])
        # no buffer, which a model that is moved from the meta device would lose
        signs = torch.tensor(self._signs, dtype=x.dtype, device=x.device)
        return (x.unflatten(-1, (x.shape[-1] // self.block, self.block)) * signs).flatten(-2)
