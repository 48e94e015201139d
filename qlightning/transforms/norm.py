"""Normalisation inside a layer, before its input is quantized: without parameters, so that nothing has to be folded."""

import torch.nn.functional as F
from torch import Tensor

from qlightning.numerics.transform import Transform


class LayerNorm(Transform):
    """(x - mean) / sqrt(variance + eps) over the features.

    Args:
        eps: What is added to the variance.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = _checked(self, eps)

    def build(self, matrix: Tensor, features: int) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps).to(x.dtype)  # autocast would return float32


class RMSNorm(Transform):
    """x / sqrt(mean x^2 + eps) over the features.

    Args:
        eps: What is added to the mean square.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = _checked(self, eps)

    def build(self, matrix: Tensor, features: int) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps).to(x.dtype)


def _checked(owner: Transform, eps: float) -> float:
    if not eps > 0:
        raise ValueError(f"{type(owner).__name__}(eps={eps}): must be positive, for example eps=1e-5")
    return eps
