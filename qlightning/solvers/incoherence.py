"""Random orthogonal maps that spread a matrix's large entries over all of them: QuIP's incoherence processing.

A map is permutation, Kronecker product of two small random orthogonal matrices, permutation: O(d^1.5) to apply, and a
function of its size and seed, so that only the seed is stored.
"""

from functools import lru_cache

import torch
from torch import Tensor

from qlightning.numerics.transform import Basis


class KroneckerRotation:
    """A random orthogonal map of vectors of one size.

    >>> rotation = KroneckerRotation(6, seed=0)
    >>> x = torch.eye(6, dtype=torch.float64)
    >>> torch.allclose(rotation.inverse(rotation(x)), x) and torch.allclose(rotation(x) @ rotation(x).T, x)
    True

    Args:
        size: d, split into two factors as equal as its prime factors allow; a prime takes one matrix of its own size.
        seed: What it is drawn from.
    """

    def __init__(self, size: int, *, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        left = balanced_factor(size)
        self.before, self.after = (torch.randperm(size, generator=generator) for _ in range(2))
        self.left, self.right = (random_orthogonal(n, generator) for n in (left, size // left))

    def __call__(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        left, right = self.left.to(x), self.right.to(x)
        y = x[..., self.before.to(x.device)].unflatten(-1, (left.shape[0], right.shape[0]))
        y = (left @ y @ right.t()).flatten(-2)
        return y[..., self.after.to(x.device)]

    def inverse(self, y: Tensor) -> Tensor:
        """(..., d) -> (..., d); the transposed map."""
        left, right = self.left.to(y), self.right.to(y)
        x = y[..., self.after.argsort().to(y.device)].unflatten(-1, (left.shape[0], right.shape[0]))
        x = (left.t() @ x @ right).flatten(-2)
        return x[..., self.before.argsort().to(y.device)]


@lru_cache(maxsize=256)
def rotation(size: int, seed: int) -> KroneckerRotation:
    """The map of that size and seed, drawn once."""
    return KroneckerRotation(size, seed=seed)


class Incoherence(Basis):
    """U W V^T for a weight's matrix W, with random orthogonal U (of output channels) and V (of inputs).

    For the quantizer of a weight: `Quantizer(format, PerTensor(), transform=Incoherence())`. U and V are functions of
    the two sizes and the seed; layers of one size have the same.

    Args:
        seed: What they are drawn from.
    """

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def build(self, matrix: Tensor, features: int) -> None:
        """There is nothing to create: both maps follow from the seed."""

    def columns(self, x: Tensor) -> Tensor:
        """x V^T: what becomes of each row (..., fan-in)."""
        return rotation(x.shape[-1], self.seed + 1)(x)

    def forward(self, x: Tensor) -> Tensor:
        return rotation(x.shape[0], self.seed)(self.columns(x).t()).t()

    def inverse(self, x: Tensor) -> Tensor:
        rows = rotation(x.shape[0], self.seed).inverse(x.t()).t()
        return rotation(x.shape[-1], self.seed + 1).inverse(rows)


def balanced_factor(size: int) -> int:
    """The largest divisor of `size` that is at most its square root.

    >>> [balanced_factor(n) for n in (1, 7, 12, 64, 11008)]
    [1, 1, 3, 8, 86]
    """
    return next(n for n in range(int(size**0.5), 0, -1) if size % n == 0)


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """(size, size), uniformly distributed (Haar), float64, drawn and factored on the CPU."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()
