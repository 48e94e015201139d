"""One scale for each sample of a batch, for scales that are functions of what a sample is conditioned on."""

from torch import Tensor

from qlightning.numerics.granularity import Granularity, Shape


class PerSample(Granularity):
    """One scale per entry of the first dimension of an activation: (samples, ...) -> (samples, 1)."""

    def view(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0] if x.dim() > 1 else 1, -1)

    def unview(self, blocks: Tensor, shape: Shape) -> Tensor:
        return blocks.reshape(shape)

    def scale_shape(self, shape: Shape) -> Shape:
        return (1, 1)  # of what is kept; how many samples there are, a batch tells
