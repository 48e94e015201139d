"""Multiply-adds of every layer, counted while the first training batch runs."""

from typing import Any

from lightning.pytorch import LightningModule

from qlightning.layers.coverage import Coverage, count_multiply_adds


class Counting:
    """Counts into a coverage once; a compiled module is left alone, whose layers cannot be watched."""

    def __init__(self) -> None:
        self._counting: Any = None

    def begin(self, pl_module: LightningModule, coverage: Coverage | None) -> None:
        """Before a batch."""
        if coverage is not None and coverage.multiply_add_share is None and not _is_compiled(pl_module):
            self._counting = count_multiply_adds(pl_module, coverage)
            self._counting.__enter__()

    def end(self) -> bool:
        """After its forward pass, or an error in it. Whether anything was counted."""
        if self._counting is None:
            return False
        self._counting.__exit__(None, None, None)
        self._counting = None
        return True


def _is_compiled(module: LightningModule) -> bool:
    return module._compiler_ctx is not None or any(
        hasattr(child, "_orig_mod") or child._compiled_call_impl is not None for child in module.modules()
    )
