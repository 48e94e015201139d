"""Sharded checkpoints, as FSDPStrategy and ModelParallelStrategy of Lightning write them, gathered in one process.

What they are made of stands in `qlightning/shards.py`. Of what the index lists only the model's tensors are read, with
`weights_only=True`.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, Metadata, load
from torch.distributed.checkpoint import metadata as parts

from qlightning.checkpoints import read_checkpoint
from qlightning.shards import REST, check_shards, read_index

_STATES = ("state_dict.", "model.")  # ModelParallelStrategy, FSDPStrategy


def read_sharded(path: Path) -> dict[str, Any]:
    """The checkpoint that a folder of shards is, without the states of optimizers, on the CPU.

    Args:
        path: The folder.

    Raises:
        ValueError: It has no state dict of a module, is not what was written, its index names files outside of the
            folder, or is more than an index.
    """
    check_shards(path)
    index = read_index(path)
    prefix = next((p for p in _STATES if any(name.startswith(p) for name in index.state_dict_metadata)), None)
    if prefix is None:
        raise ValueError(
            f"{path} holds no module: write it with FSDPStrategy(state_dict_type='sharded') or ModelParallelStrategy"
        )
    flat = {
        name: torch.empty(described.size, dtype=described.properties.dtype)
        for name, described in index.state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(described, parts.TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is meant
        load(flat, storage_reader=_Reader(path, index), no_dist=True)
    state: dict[str, Tensor] = {name.removeprefix(prefix): tensor for name, tensor in flat.items()}
    return {**read_checkpoint(path / REST), "state_dict": state}


class _Reader(FileSystemReader):
    """torch's reader with an index that is read already."""

    def __init__(self, path: Path, index: Metadata) -> None:
        super().__init__(path)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index
