"""Sharded checkpoints, as FSDPStrategy and ModelParallelStrategy of Lightning write them, gathered in one process.

Such a checkpoint is a folder: `meta.pt` is a checkpoint without tensors, `.metadata` the pickled index of
`torch.distributed.checkpoint` and `*.distcp` its tensors. torch unpickles the index without asking; here it is read by
an unpickler that knows the classes of an index and nothing else, and of what it lists only the model's tensors are
read, with `weights_only=True`.
"""

import pickle
import warnings
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, Metadata, load
from torch.distributed.checkpoint import metadata as parts
from torch.distributed.checkpoint.filesystem import _StorageInfo

from qlightning.checkpoints import read_checkpoint
from qlightning.export.artifact import inside

INDEX, REST = ".metadata", "meta.pt"

_STATES = ("state_dict.", "model.")  # ModelParallelStrategy, FSDPStrategy

_CLASSES = {
    **{(cls.__module__, cls.__qualname__): cls for cls in (parts.Metadata, parts.MetadataIndex, parts.StorageMeta)},
    **{(cls.__module__, cls.__qualname__): cls for cls in (parts.TensorStorageMetadata, parts.BytesStorageMetadata)},
    **{(cls.__module__, cls.__qualname__): cls for cls in (parts.ChunkStorageMetadata, parts.TensorProperties)},
    (parts.__name__, "_MEM_FORMAT_ENCODING"): parts._MEM_FORMAT_ENCODING,
    (_StorageInfo.__module__, "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): lambda name: torch.strided,
    **{(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")},
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in vars(torch).values()
       if isinstance(dtype, torch.dtype)},
}  # fmt: skip


def is_sharded(path: Path) -> bool:
    """Whether it is the folder of a sharded checkpoint."""
    return (path / INDEX).is_file() and (path / REST).is_file()


def read_sharded(path: Path) -> dict[str, Any]:
    """The checkpoint that a folder of shards is, without the states of optimizers, on the CPU.

    Args:
        path: The folder.

    Raises:
        ValueError: It has no state dict of a module, its index names files outside of the folder, or is more than an
            index.
    """
    index = _read_index(path)
    prefix = next((p for p in _STATES if any(name.startswith(p) for name in index.state_dict_metadata)), None)
    if prefix is None:
        raise ValueError(
            f"{path} holds no module: write it with FSDPStrategy(state_dict_type='sharded') or ModelParallelStrategy"
        )
    for stored in index.storage_data.values():
        inside(path, stored.relative_path)
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


class _Unpickler(pickle.Unpickler):
    """Reads an index, whose classes hold numbers and names alone."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return _CLASSES[module, name]


def _read_index(path: Path) -> Metadata:
    try:
        with (path / INDEX).open("rb") as file:
            index = _Unpickler(file).load()
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path / INDEX} is no index of a checkpoint: it names {error}, and nothing was run") from None
    if not isinstance(index, Metadata) or index.storage_data is None:
        raise ValueError(f"{path / INDEX} is no index of a checkpoint")
    return index


class _Reader(FileSystemReader):
    """torch's reader with an index that is read already."""

    def __init__(self, path: Path, index: Metadata) -> None:
        super().__init__(path)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index
