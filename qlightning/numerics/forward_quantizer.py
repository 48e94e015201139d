"""What a layer asks of a quantizer in its forward pass, and no more.

`TensorQuantizer` answers it with arithmetic that also has gradients, a life cycle and a place in checkpoints. A mark in
a traced graph (`export/onnx_trace.py`) answers nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from qlightning.numerics.autograd import FakeQuantize
from qlightning.numerics.granularity import Granularity
from qlightning.numerics.rounding import Rounding
from qlightning.numerics.scales import Scale

State = tuple[Any, ...]
"""Tensors, or None."""


class ForwardQuantizer(nn.Module, ABC):
    """Values on a grid for one tensor.

    Attributes:
        enabled: False makes it the identity (at no cost); phases switch this.
        released: It acted and was switched off for the rest of the run, which no phase takes back.
        gathered: What it is given is on its grid already: a sharded weight whose codes were gathered. Its gradient is
            then taken on the shards.
        arrived: What it was decoded from, as a layer multiplies it that multiplies codes (`layers/on_codes.py`).
        kept: What a layer keeps of the quantized weight between passes (`layers/kept_weight.py`), or None.
    """

    enabled: bool = True
    released: bool = False
    gathered: bool = False
    arrived: Any = None
    kept: Any = None
    granularity: Granularity
    scale: Scale
    rounding: Rounding

    @abstractmethod
    def prepare(self, x: Tensor) -> State:
        """The state for one forward call."""

    @abstractmethod
    def values(self, x: Tensor, state: State, key: Tensor | None) -> Tensor:
        """Quantized values of `x` on a given state, of its shape and dtype, outside autograd."""

    @abstractmethod
    def bypass(self, x: Tensor) -> Tensor:
        """x itself, where the quantizer does not act."""

    @property
    @abstractmethod
    def needs_input(self) -> bool:
        """Whether backward needs x itself and not only the codes."""

    @property
    @abstractmethod
    def recomputable(self) -> bool:
        """Whether backward finds the same state again, so that it need not be saved."""

    @property
    def acts(self) -> bool:
        """Whether values have to be brought onto the grid."""
        return self.enabled and not self.gathered

    def learned(self) -> Iterator[nn.Parameter]:
        """The parameters that gradient descent moves (learned steps and offsets)."""
        return self.scale.parameters(recurse=False)  # recursion hashes modules, which torch.compile cannot trace

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize: values on the grid, of x's shape and dtype.

        NaN stays NaN. Infinity makes every value that shares its scale non-finite when the scale covers it (absmax,
        min-max, MSE, two-level ...), and saturates like any large value when it does not (static scales, percentiles,
        medians).
        """
        if not self.acts or x.numel() == 0:
            return self.bypass(x)
        state = self.prepare(x)
        return FakeQuantize.apply(x, self, self.rounding.key(), *state)
