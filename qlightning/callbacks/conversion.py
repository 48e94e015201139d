"""The moment of conversion: when a module is complete, before it is sharded, given optimizers and restored."""

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.nn.parallel import DistributedDataParallel

_IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"

Convert = Callable[[LightningModule, bool], None]
"""Converts what there is of a module; told whether the module is complete by now."""


class Conversion:
    """Puts itself behind the hooks of a module in which it may still build or load layers."""

    def __init__(self) -> None:
        self._patched: dict[str, Any] = {}

    def begin(self, pl_module: LightningModule, convert: Convert) -> None:
        """Convert now, and again after whatever hook of the user's may still build or load modules."""
        later = [hook for hook in ("setup", "configure_model") if is_overridden(hook, pl_module)]
        for hook in later:
            self._convert_after(hook, pl_module, convert, hook == later[-1])
        if not later:
            convert(pl_module, True)
        elif any(True for _ in pl_module.parameters()):
            convert(pl_module, False)

    def _convert_after(self, hook: str, pl_module: LightningModule, convert: Convert, complete: bool) -> None:
        original: Callable[..., Any] = getattr(pl_module, hook)

        # Lightning unwraps functools.wraps and would then take the hook for one that is not overridden.
        def converting(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            convert(pl_module, complete)

        self.put(pl_module, hook, converting)

    def put(self, pl_module: LightningModule, name: str, method: Callable[..., Any]) -> None:
        """Give the module a method of its own until `end`."""
        self._patched.setdefault(name, pl_module.__dict__.get(name))  # a user or strategy may have put one there
        setattr(pl_module, name, method)

    def keep_apart(self, pl_module: LightningModule, buffers: Iterable[str]) -> None:
        """Let DDP leave buffers alone, by name: it overwrites every rank's with the first rank's."""
        own = self._patched.setdefault(_IGNORED_BY_DDP, pl_module.__dict__.get(_IGNORED_BY_DDP))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(pl_module, [*(own or ()), *buffers])

    def end(self, pl_module: LightningModule) -> None:
        """Give the module its own hooks back."""
        for hook, own in self._patched.items():
            pl_module.__dict__.pop(hook, None)
            if own is not None:
                setattr(pl_module, hook, own)
        self._patched.clear()
