"""What is trained in place of a frozen weight, inside its quantizer: Q(effective weight) and not Q(weight) + update.

The effective weight is as large as the weight itself, so a layer never keeps it: it asks for it in forward and once
more in backward, and for the gradients of the adapter's own (small) tensors.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor


class Inside(ABC):
    """A rule from a weight's matrix (output channels, fan-in) and a few small tensors to the matrix to be quantized."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that gradient descent moves."""

    @abstractmethod
    def effective(self, matrix: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The effective weight (output channels, fan-in), outside autograd."""

    @abstractmethod
    def gradients(self, grad: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of the tensors from that of the effective weight; the weight's own is `grad` itself."""
