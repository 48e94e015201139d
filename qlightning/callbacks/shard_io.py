"""Sharded checkpoints of Lightning's strategies, written and read as `qlightning/shards.py` does.

Strategies that shard write past the Trainer's CheckpointIO. They are led back to it: `save_shards` is asked.
"""

import io
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy

from qlightning.shards import REST, check_shards

_MODULE = {ModelParallelStrategy.save_checkpoint: "state_dict", FSDPStrategy.save_checkpoint: "model"}
"""What Lightning calls the module's state in a folder of shards."""


def keep_shards_whole(strategy: Strategy, otherwise: CheckpointIO) -> None:
    """Let a strategy that shards write through its CheckpointIO, and end it as others do. Once is enough.

    Args:
        strategy: Of a Trainer; one that does not shard, or writes in a way of its own, is left alone.
        otherwise: Writes where the one that was chosen knows nothing of shards.

    Raises:
        ValueError: An AsyncCheckpointIO was chosen, which no strategy asks to write shards.
    """
    if isinstance(strategy, ModelParallelStrategy) and "teardown" not in vars(strategy):
        strategy.teardown = _ending(strategy)  # type: ignore[method-assign]
    if not _writes_shards(strategy):
        return
    if isinstance(strategy.checkpoint_io, _WrappingCheckpointIO):
        name = type(strategy.checkpoint_io).__name__
        raise ValueError(
            f"{name} is for checkpoints of one file, and {type(strategy).__name__} writes shards: write "
            "Trainer(plugins=[qlightning.BackgroundCheckpoints()])"
        )
    if "save_checkpoint" not in vars(strategy):
        strategy.save_checkpoint = _saving(strategy, otherwise)  # type: ignore[method-assign]


def _writes_shards(strategy: Any) -> bool:
    sharded = getattr(strategy, "_save_distributed_checkpoint", False) or (
        getattr(strategy, "_state_dict_type", "") == "sharded"
    )
    return sharded and type(strategy).save_checkpoint in _MODULE


def _saving(strategy: Any, otherwise: CheckpointIO) -> Callable[..., None]:
    name, original = _MODULE[type(strategy).save_checkpoint], strategy.save_checkpoint

    @wraps(original)
    def save_checkpoint(checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            original(checkpoint, filepath, storage_options)  # which says that it has no place for them
        path = Path(strategy.broadcast(filepath))
        states = {name: checkpoint.pop("state_dict")}
        states |= {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states", []))}
        rest = io.BytesIO()
        if strategy.global_rank == 0:
            torch.save(checkpoint, rest)
        writer: Any = strategy.checkpoint_io if hasattr(strategy.checkpoint_io, "save_shards") else otherwise
        writer.save_shards(states, rest.getvalue(), path)

    return save_checkpoint


def _ending(strategy: Strategy) -> Callable[[], None]:
    original = strategy.teardown

    @wraps(original)
    def teardown() -> None:
        try:
            original()
        finally:
            strategy.checkpoint_io.teardown()

    return teardown


def check_together(strategy: Strategy, checkpoint_path: Any) -> None:
    """Check a folder of shards, all processes together; anything else is left to whoever reads it.

    Raises:
        ValueError: In all of them, where one finds that it is not what was written.
    """
    path = Path(strategy.broadcast(checkpoint_path))
    if not (path / REST).is_file():
        return
    said = None
    try:
        check_shards(path, rank=dist.get_rank(), ranks=dist.get_world_size())
    except (ValueError, OSError) as error:
        said = str(error)
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, said)
    if wrong := [words for words in everyone if words]:
        raise ValueError(wrong[0])
