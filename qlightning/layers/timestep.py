"""A denoiser whose time step the scales of its layers depend on."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qlightning.layers.layer import Twin, plain_class
from qlightning.numerics.conditioned import conditioned, publish

_NAMES = ("timestep", "timesteps")


class TimestepTwin(Twin):
    """A module whose forward is told a `timestep`, with layers inside whose scales are conditioned on it."""

    placements = {}
    shows = False

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return _position(type(module)) is not None  # type: ignore[arg-type]

    @classmethod
    def surrounds(cls, module: nn.Module) -> bool:
        return any(True for _ in conditioned(module))

    def weights(self) -> Mapping[str, Tensor]:
        return {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plain = plain_class(self)
        position = _position(plain)  # type: ignore[arg-type]
        assert position is not None
        name, index = position
        timestep = args[index] if index < len(args) else kwargs.get(name)
        if timestep is not None:  # blocks inside may have the argument too and not be given it
            publish(self, timestep)
        return plain.forward(self, *args, **kwargs)


@functools.cache
def _position(kind: type[nn.Module]) -> tuple[str, int] | None:
    """Name and place of the time step among the arguments of a class's forward, or None."""
    try:
        names = list(inspect.signature(kind.forward).parameters)[1:]
    except (TypeError, ValueError):  # a forward without a signature
        return None
    return next(((name, names.index(name)) for name in _NAMES if name in names), None)
