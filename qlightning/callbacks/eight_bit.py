"""8-bit Adam: the optimizer's memory of a weight in 2 bytes instead of 8."""

from collections.abc import Callable
from types import MethodType
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import Adam, AdamW, Optimizer

from qlightning.callbacks.checkpoint_io import keep_checkpoints_whole
from qlightning.callbacks.conversion import Conversion

_IMPLEMENTATION = {"foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay", "amsgrad"}


class EightBitAdam(Callback):
    """Keeps the moments of torch's Adam and AdamW in 8 bits, whatever module made them.

    8-bit Optimizers via Block-wise Quantization (Dettmers et al., ICLR 2022, arXiv 2110.02861): blocks of 256 share a
    scale, values have 256 unevenly spaced levels, the update is computed in float32. No hyperparameter changes; weights
    of fewer than 4096 elements (and with torchao those that are no multiple of 256) keep 32 bits. Checkpoints hold the
    codes, and a resumed run goes on bit for bit. Deviation: embeddings are not exempt.

    Args:
        library: Whose kernels: "bitsandbytes", or "torchao", which shards (FSDP2) and compiles its step at first use.

    Raises:
        ValueError: From fit, for an optimizer that is neither Adam nor AdamW, or has options that 8 bits have not; and
            for shards with bitsandbytes, or with torchao where they are saved as one file.
    """

    def __init__(self, library: Literal["bitsandbytes", "torchao"] = "bitsandbytes") -> None:
        if library not in ("bitsandbytes", "torchao"):
            raise ValueError(f"library={library!r}: write EightBitAdam('bitsandbytes') or EightBitAdam('torchao')")
        self.library = library
        self._patches = Conversion()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if isinstance(trainer.strategy, ModelParallelStrategy):
            self._check_shards(trainer.strategy)
        _kind("Adam", self.library)  # its import is what lets a checkpoint with its tensors be read
        keep_checkpoints_whole(trainer)
        own: Callable[[], Any] = pl_module.configure_optimizers

        def configure_optimizers() -> Any:
            return _swapped(own(), self.library, {})

        self._patches.put(pl_module, "configure_optimizers", configure_optimizers)

    def _check_shards(self, strategy: ModelParallelStrategy) -> None:
        name = type(strategy).__name__
        if self.library == "bitsandbytes":
            raise ValueError(f"bitsandbytes' moments cannot be sharded by {name}: write EightBitAdam('torchao')")
        if not strategy._save_distributed_checkpoint:
            raise ValueError(
                "torchao's moments are saved and read as shards, and not as one file: write "
                f"{name}(save_distributed_checkpoint=True)"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._patches.end(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._patches.end(pl_module)


def _swapped(value: Any, library: str, made: dict[Optimizer, Optimizer]) -> Any:
    """What `configure_optimizers` may return, with 8-bit optimizers in it, to which its schedulers now point."""
    if isinstance(value, Optimizer):
        return made.setdefault(value, made.get(value) or in_eight_bits(value, library))
    if isinstance(value, dict):  # the optimizer stands before its scheduler, or else is met through it
        return {name: _swapped(item, library, made) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_swapped(item, library, made) for item in value])
    if isinstance(getattr(value, "optimizer", None), Optimizer):
        value.optimizer = _swapped(value.optimizer, library, made)
        for child in getattr(value, "_schedulers", []):
            _swapped(child, library, made)
    return value


def in_eight_bits(optimizer: Optimizer, library: str) -> Optimizer:
    """An optimizer of the same groups and options with 8-bit moments.

    Raises:
        ValueError: It is neither torch's Adam nor AdamW, has begun, or has options that 8 bits have not.
    """
    kind = type(optimizer)
    if kind not in (Adam, AdamW) or optimizer.state:
        raise ValueError(
            f"EightBitAdam keeps the moments of torch.optim.Adam and AdamW, before their first step; here is a "
            f"{kind.__name__}: return torch.optim.AdamW(...) from configure_optimizers, or leave EightBitAdam out"
        )
    for group in optimizer.param_groups:
        if used := [name for name in ("amsgrad", "maximize") if group.get(name)]:
            raise ValueError(f"8-bit {kind.__name__} has no {used[0]}: leave {used[0]}=True out")
    groups = [{k: v for k, v in g.items() if k not in _IMPLEMENTATION} for g in optimizer.param_groups]
    made: Optimizer = _kind(kind.__name__, library)(groups, lr=float(optimizer.defaults["lr"]))
    made.step = MethodType(_counted(type(made).step), made)  # type: ignore[method-assign]
    return made


def _kind(name: str, library: str) -> Any:
    if library == "bitsandbytes":
        import bitsandbytes

        return getattr(bitsandbytes.optim, f"{name}8bit")
    try:
        import torchao.optim
    except ImportError as error:
        raise ValueError(f"EightBitAdam('torchao') needs torchao ({error}): pip install 'qlightning[export]'") from None
    return getattr(torchao.optim, f"{name}8bit")


def _counted(step: Callable[..., Any]) -> Callable[..., Any]:
    """A scheduler marks the optimizer it was made for, and warns where the one it steps with has no mark."""

    def counted(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        self._opt_called = True  # type: ignore[attr-defined]
        with torch.enable_grad():
            return step(self, *args, **kwargs)

    counted._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return counted
