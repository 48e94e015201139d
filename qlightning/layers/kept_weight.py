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
    `clear`. Code that torch.compile has made can ask for no version: there only what is `prepared` is used, in training
    and by whoever knows that it is up to date.

    Attributes:
        prepared: What compiled code reads in the place of what it would make.
    """

    prepared: "Prepared | None" = None

    def __init__(self) -> None:
        self._stamp: Stamp = ()
        self._made: dict[Any, Any] = {}

    def clear(self) -> None:
        """Forget everything, and free its memory."""
        self._stamp, self._made, self.prepared = (), {}, None

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


class Prepared(NamedTuple):
    """A quantized weight, made outside of what torch.compile has compiled.

    Attributes:
        values: The weight that is multiplied with.
        dtype: What it was cast to, or None for the weight's own.
        codes: Its codes where codes are multiplied.
    """

    values: Tensor
    dtype: torch.dtype | None
    codes: Any = None

    def get(self, what: Any, make: Callable[[], Made]) -> Made:
        """What was prepared under this name, or else what `make` gives."""
        if what == "codes":
            return make() if self.codes is None else self.codes
        return self.values if what == ("values", self.dtype) else make()  # type: ignore[return-value]


class Reuse(NamedTuple):
    """A weight's `KeptWeight` as one forward pass and its backward see it."""

    kept: KeptWeight
    stamp: Stamp
    keeps_state: bool
    prepared: Prepared | None = None

    def get(self, what: Any, make: Callable[[], Made]) -> Made:
        """What was kept under this name, or else what `make` gives."""
        if self.prepared is not None:
            return self.prepared.get(what, make)
        return self.kept.get(what, self.stamp, make)


def reuse_of(quantizer: TensorQuantizer | None, weight: Tensor, others: Iterable[Tensor]) -> Reuse | None:
    """What a weight's quantizer keeps, where it keeps anything and acts.

    The stamp tells whether the quantized weight is still the one that would be made now. Random rounding is part of
    it: its step is a buffer, and each of its draws a version.

    Args:
        quantizer: The weight's.
        weight: The weight.
        others: What else the quantized weight is made from (an adapter's tensors).
    """
    if quantizer is None or not (quantizer.acts and quantizer.kept is not None):
        return None
    if torch.compiler.is_compiling():
        prepared: Prepared | None = quantizer.kept.prepared if quantizer.training else None
        return None if prepared is None else Reuse(quantizer.kept, (), False, prepared)
    scale, parameters = quantizer.scale, list(quantizer.parameters())
    versions = ((t.data_ptr(), t._version, t.dtype) for t in (weight, *parameters, *quantizer.buffers(), *others))
    held = getattr(scale, "held", None)
    stamp = quantizer.training, id(quantizer.format), id(scale), held, *versions
    return Reuse(quantizer.kept, stamp, not parameters and not scale.static)
