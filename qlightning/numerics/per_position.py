"""A granularity for inputs of fixed length: every position has a scale of its own."""

from torch import Tensor

from qlightning.numerics.granularity import Granularity, Shape


class PerPosition(Granularity):
    """One scale per token position, over batch and features: (..., positions, features) -> (positions, 1).

    Unlike those of `PerToken`, such scales can be learned: there are always as many.

    Args:
        positions: Tokens of every input, for a vision transformer patches plus special tokens.
    """

    needs_tokens = True

    def __init__(self, positions: int) -> None:
        if positions < 1:
            raise ValueError(f"PerPosition({positions}): an input has at least one token, for example PerPosition(197)")
        self.positions = positions

    def view(self, x: Tensor) -> Tensor:
        self.scale_shape(tuple(x.shape))
        return x.movedim(-2, 0).reshape(self.positions, -1)

    def unview(self, blocks: Tensor, shape: Shape) -> Tensor:
        return blocks.reshape(shape[-2], *shape[:-2], shape[-1]).movedim(0, -2)

    def scale_shape(self, shape: Shape) -> Shape:
        # a quantizer is built with (-1, features), when the positions are not known yet
        if shape[:-1] != (-1,) and (len(shape) < 2 or shape[-2] != self.positions):
            fits = f"PerPosition({shape[-2]}) or " if len(shape) > 1 else ""
            raise ValueError(
                f"an input of shape {tuple(shape)} does not have {self.positions} positions: write {fits}PerTensor()"
            )
        return (self.positions, 1)
