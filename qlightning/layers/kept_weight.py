"""A quantized weight that is made once and used again until the weight, its quantizer or its adapter changes."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from qlightning.numerics.tensor_quantizer import TensorQuantizer

Made = TypeVar("Made")
Stamp = tuple[Any, ...]


class KeptWeight:
    """What was made of one weight, beside the versions of everything it was made from.

    A layer whose weight quantizer has one (`quantizer.kept`) quantizes its weight once for the forward and backward
    passes of all micro-batches of a step, and once for all calls and layers that share the weight. The values are the
    same bits. It costs a copy of the weight in the dtype it is multiplied in, besides its scales (and its codes where
    codes are multiplied), from the first forward pass on until `clear`.

    Torch counts the versions of a tensor, but not what is done to its `.data`: who changes a weight in that way calls
    `clear`. It does not act inside torch.compile, which sees the two passes together and makes common values once.
    """

    def __init__(self) -> None:
        self._stamp: Stamp = ()
        self._made: dict[Any, Any] = {}

    def clear(self) -> None:
        """Forget everything, and free its memory."""
        self._stamp, self._made = (), {}

    def get(self, what: Any, stamp: Stamp, make: Callable[[], Made]) -> Made:
        """What was kept under this name and stamp, or else what `make` gives."""
        if stamp != self._stamp:
            self._stamp, self._made = stamp, {}
        if what not in self._made:
            with torch.no_grad():
                self._made[what] = make()
        made: Made = self._made[what]
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptWeight":
        return KeptWeight()

    def __reduce__(self) -> Any:
        return KeptWeight, ()


class Reuse(NamedTuple):
    """A weight's `KeptWeight` as one forward pass and its backward see it."""

    kept: KeptWeight
    stamp: Stamp
    keeps_state: bool

    def get(self, what: Any, make: Callable[[], Made]) -> Made:
        """What was kept under this name, or else what `make` gives."""
        return self.kept.get(what, self.stamp, make)


def reuse_of(quantizer: TensorQuantizer | None, weight: Tensor, others: Iterable[Tensor]) -> Reuse | None:
    """What a weight's quantizer keeps, where it keeps anything and acts outside torch.compile.

    The stamp tells whether the quantized weight is still the one that would be made now. Random rounding is part of
    it: its step is a buffer, and each of its draws a version.

    Args:
        quantizer: The weight's.
        weight: The weight.
        others: What else the quantized weight is made from (an adapter's tensors).
    """
    if quantizer is None or torch.compiler.is_compiling() or not (quantizer.acts and quantizer.kept is not None):
        return None
    scale, parameters = quantizer.scale, list(quantizer.parameters())
    versions = ((t.data_ptr(), t._version, t.dtype) for t in (weight, *parameters, *quantizer.buffers(), *others))
    held = getattr(scale, "held", None)
    stamp = quantizer.training, id(quantizer.format), id(scale), held, *versions
    return Reuse(quantizer.kept, stamp, not parameters and not scale.static)
