"""Learned shifts around a quantizer of activations, one per feature."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from qlightning.numerics.granularity import Shape
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.spec import parse
from qlightning.numerics.tensor_quantizer import Gradients, State, TensorQuantizer


class Shifted(TensorQuantizer):
    """x -> Q(x + before) + after, with two learned vectors of one entry per feature that start at zero.

    `after` folds into the bias of the layer that follows, `before` into that of the layer in front. As used in OFQ (Liu
    et al., ICML 2023, arXiv 2302.02210) and, before a sign, in ReActNet.

    Args:
        quantizer: Q, or its spec; for example "int4-tensor-lsq".
    """

    before: nn.Parameter
    after: nn.Parameter

    def __init__(self, quantizer: str | Quantizer) -> None:
        super().__init__()
        self.quantizer = parse(quantizer) if isinstance(quantizer, str) else quantizer
        inner = self.quantizer
        self.format, self.granularity, self.gradient = inner.format, inner.granularity, inner.gradient
        # the same objects, not children once more: `quantizer.scale` is their name in the state dict
        self.__dict__["scale"], self.__dict__["rounding"] = inner.scale, inner.rounding

    def build(self, shape: Shape) -> None:
        if shape[-1] < 0:
            raise ValueError(
                f"{self!r} shifts every feature and does not know their number here: write {self.quantizer!r}"
            )
        self.quantizer.build(shape)
        self.before = nn.Parameter(torch.zeros(shape[-1], dtype=torch.float32))
        self.after = nn.Parameter(torch.zeros(shape[-1], dtype=torch.float32))

    def observe(self, x: Tensor) -> None:
        self.quantizer.observe(self._shifted(x, self.before.detach()))

    def learned(self) -> Iterator[nn.Parameter]:
        yield from self.quantizer.learned()
        yield from (self.before, self.after)

    def grid(self, x: Tensor) -> State:
        return (self.before, self.after, *self.quantizer.grid(self._shifted(x, self.before.detach())))

    @staticmethod
    def _shifted(x: Tensor, by: Tensor) -> Tensor:
        return (x.float() + by).to(x.dtype)

    def on_grid(self, x: Tensor, state: State, key: Tensor | None) -> Tensor:
        before, after, *grid = state
        return self._shifted(self.quantizer.on_grid(self._shifted(x, before), tuple(grid), key), after)

    def steps(self, state: State) -> Tensor:
        return self.quantizer.steps(state[2:])

    def grid_gradients(
        self, grad: Tensor, x: Tensor | None, state: State, key: Tensor | None, wanted: Sequence[bool]
    ) -> Gradients:
        before, after, *grid = state
        shifted = None if x is None else self._shifted(x, before)
        grad_x, *rest = self.quantizer.grid_gradients(grad, shifted, tuple(grid), key, wanted[2:])
        grad_before = _per_feature(grad_x).to(before.dtype) if wanted[0] else None
        grad_after = _per_feature(grad).to(after.dtype) if wanted[1] else None
        return grad_x, grad_before, grad_after, *rest

    def deploys_like(self, other: TensorQuantizer) -> bool:
        return isinstance(other, Shifted) and self.quantizer.deploys_like(other.quantizer)

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        """The quantizer's, and the two vectors in float32."""
        return self.quantizer.stored_bytes(shape, dtype) + 2 * shape[-1] * 4


def _per_feature(grad: Tensor) -> Tensor:
    return grad.float().reshape(-1, grad.shape[-1]).sum(0)
