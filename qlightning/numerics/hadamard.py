"""The Walsh-Hadamard transform: the orthogonal matrix of +-1 / sqrt(n), by n log n additions and never as a matrix.

Additions in float32 give the same bits on every device and no TF32 gets in their way. The matrix is symmetric and its
own inverse, so the transform is its own inverse and its own gradient.
"""

from typing import Any

import torch
from torch import Tensor

from qlightning.numerics.kernels.switch import kernels_act


def largest_block(size: int) -> int:
    """The largest power of two that divides `size`.

    >>> largest_block(256), largest_block(11008)
    (256, 256)
    """
    return size & -size


def check_block(block: int, size: int) -> None:
    """Raise ValueError unless blocks of `block` are powers of two that tile `size` features."""
    if block < 1 or block & (block - 1):
        raise ValueError(f"a Hadamard matrix of size {block} is not made here: write a power of two, for example 16")
    if size % block:
        raise ValueError(f"blocks of {block} do not tile {size} features: {largest_block(size)} is the largest that do")


def hadamard(x: Tensor, block: int | None = None) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of neighbouring features, in float32, in x's dtype.

    >>> hadamard(torch.tensor([2.0, 0.0, 0.0, 0.0]))
    tensor([1., 1., 1., 1.])

    Args:
        x: (..., features).
        block: Features that are mixed with each other, a power of two that divides them; the largest when not given.

    Raises:
        ValueError: `block` is no power of two or does not divide the features.
    """
    size = x.shape[-1]
    block = largest_block(size) if block is None else block
    check_block(block, size)
    return _Hadamard.apply(x, block)  # type: ignore[no-any-return]


_LARGEST_BLOCK = 16384  # what one program of the kernel holds


class _Hadamard(torch.autograd.Function):
    """Saves nothing for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int) -> Tensor:
        ctx.block = block
        narrow = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if narrow and block <= _LARGEST_BLOCK and kernels_act(x):
            return rotated(x.contiguous(), block)
        return rotate_slow(x, block)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Hadamard.apply(grad, ctx.block), None


@torch.library.custom_op("qlightning::rotated", mutates_args=())
def rotated(x: Tensor, block: int) -> Tensor:
    """As an operator that torch.compile does not look into: see `kernels.hadamard.rotate`."""
    from qlightning.numerics.kernels.hadamard import rotate

    return rotate(x, block)


@rotated.register_fake
def _(x: Tensor, block: int) -> Tensor:
    return torch.empty_like(x)


def rotate_slow(x: Tensor, block: int) -> Tensor:
    """The transform in plain torch, without its derivative."""
    y, width = x.float(), 1
    while width < block:
        first, second = y.unflatten(-1, (y.shape[-1] // (2 * width), 2, width)).unbind(-2)
        y = torch.stack((first + second, first - second), -2).flatten(-3)
        width *= 2
    # a product with a Python float has the same bits on every device, a quotient has not
    return (y * block**-0.5).to(x.dtype)
