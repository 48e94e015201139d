"""Sharded checkpoints: folders to which every process writes its share, there whole or not at all.

The format is torch's own (`torch.distributed.checkpoint`) as Lightning's strategies lay it out: `*.distcp` files of
tensors, `.metadata`, their pickled index, and `meta.pt`, the checkpoint without tensors. Lightning writes them into the
folder that a run resumes from, one after the other, and over those of an earlier save. Here the folder is filled under
another name; when every process has read its part back from the disk and the first one sees it, sizes and checksums of
all files are written beside them and the folder gets its name.

torch unpickles the index without asking; here it is read first by an unpickler that knows the classes of an index and
nothing else.
"""

import hashlib
import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import FileSystemWriter, Metadata, save
from torch.distributed.checkpoint import metadata as parts
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan
from torch.futures import Future

from qlightning.folders import fingerprint, inside, no_room, put_in_place

INDEX, REST, SUMS = ".metadata", "meta.pt", "checksums.json"

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


def write_shards(
    states: Mapping[str, Any], rest: bytes, path: str | Path, *, group: ProcessGroup | None = None
) -> None:
    """Write a sharded checkpoint; every process of the group must call it, and all return when it is there.

    Args:
        states: State dicts by name, with this process' shares as DTensors or ShardedTensors.
        rest: What `meta.pt` holds; the first process' counts.
        path: The folder to be, on a file system that all processes see; what is there is replaced in one move.
        group: Whose backend works on the CPU; the default group when left out.

    Raises:
        OSError: A process could not write, or what it wrote cannot be read back. In all processes alike; what was at
            `path` is still there.
    """
    path = Path(path).absolute()
    writer = _Writer(path, rest)
    try:
        save(dict(states), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        if writer.coordinates:
            shutil.rmtree(writer.folder, ignore_errors=True)
        (rank, (cause, _)), *_ = error.failures.items()
        kept = "; the checkpoint that was there is unharmed" if path.exists() else ""
        why = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        said = (
            f"checkpoint {path} could not be written (rank {rank}: {why}){kept}: make room, or choose another folder "
            "that all processes see, ModelCheckpoint(dirpath=...)"
        )
        code = getattr(cause, "errno", None)
        raise (OSError(said) if code is None else OSError(code, said)) from cause


class _Writer(FileSystemWriter):
    """torch's writer, into a folder that gets its name at last."""

    def __init__(self, place: Path, rest: bytes) -> None:
        # follows from its name, so that who takes the step again writes over what a killed process left
        self.folder = place.parent / f".partial-{hashlib.sha256(place.name.encode()).hexdigest()[:12]}"
        self.place, self.rest, self.coordinates = place, rest, False
        super().__init__(self.folder)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        self.coordinates = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Before any process writes, the first one makes the folder; what lies there goes."""
        if not self.coordinates:
            return plan
        if self.folder.exists():
            shutil.rmtree(self.folder)
        return super().prepare_local_plan(plan)

    def write_data(self, *args: Any) -> Future[Any]:
        """(what was written where, fingerprints of this process' files as they are read back)"""
        try:
            written = super().write_data(*args).value()
        except Exception as error:  # what is behind it stays here when the error is sent to the other processes
            raise no_room(error) or error from None
        files = {result.storage_data.relative_path for result in written}
        done: Future[Any] = Future()
        done.set_result((written, {name: fingerprint(self.folder / name) for name in sorted(files)}))
        return done

    def finish(self, metadata: Metadata, results: Any) -> None:
        """In the first process, when all have written."""
        with (self.folder / REST).open("wb") as file:
            file.write(self.rest)
        super().finish(metadata, [written for written, _ in results])
        sums = {name: seen for _, files in results for name, seen in files.items()}
        for rank, (_, files) in enumerate(results):
            for name, seen in files.items():
                if not (part := self.folder / name).is_file() or part.stat().st_size != seen["bytes"]:
                    raise OSError(f"{name} of rank {rank} cannot be seen from the first process")
        sums |= {name: fingerprint(self.folder / name) for name in (INDEX, REST)}
        (self.folder / SUMS).write_text(json.dumps({"files": sums}, indent=1), encoding="utf-8")
        put_in_place(self.folder, self.place)


# --- reading ---


def check_shards(path: str | Path, *, rank: int = 0, ranks: int = 1) -> None:
    """Check that a sharded checkpoint is what was written, and its index nothing but an index.

    One that Lightning wrote on its own has no checksums: then its files must be there, as long as the index says.

    Args:
        path: The folder.
        rank: Which process this is of those that share the work.
        ranks: How many share it: each reads one file of so many, and all read the index.

    Raises:
        ValueError: Something is missing or changed, or the index names files outside of the folder or other classes.
    """
    path = Path(path)
    broken = _differing(path, rank, ranks) if (path / SUMS).is_file() else None
    if broken is None:
        ends = _ends(read_index(path))
        for name in ends:
            inside(path, name)
        broken = next((name for name, end in ends.items() if _size(path / name) < end), None)
    if broken is not None:
        raise ValueError(
            f"{path} is no whole checkpoint ({broken} is missing or not what was written): resume from another one, "
            "such as an earlier step of the same folder"
        )


def _ends(index: Metadata) -> dict[str, int]:
    """How long each file is at least, by name."""
    ends: dict[str, int] = {}
    try:
        for stored in index.storage_data.values():
            ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
    except (AttributeError, TypeError) as error:  # a changed byte in a name
        raise ValueError(f"{INDEX} is no index of a checkpoint: {error}") from None
    return ends


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _differing(path: Path, rank: int, ranks: int) -> str | None:
    """The first file of this process' share that is not what the checksums say."""
    try:
        files = dict(json.loads((path / SUMS).read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError):
        return SUMS
    if not {INDEX, REST} <= files.keys():
        return SUMS
    for name in [INDEX, *sorted(files.keys() - {INDEX})[rank::ranks]]:
        if not (file := inside(path, name)).is_file() or fingerprint(file) != files[name]:
            return name
    return None


class _Unpickler(pickle.Unpickler):
    """Reads an index, whose classes hold numbers and names alone."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return _CLASSES[module, name]


def read_index(path: Path) -> Metadata:
    """The index of a sharded checkpoint.

    Raises:
        ValueError: It is none, or names other classes; nothing was run.
    """
    if not (path / INDEX).is_file():
        raise ValueError(f"{path} is no whole checkpoint ({INDEX} is missing): resume from another one")
    try:
        with (path / INDEX).open("rb") as file:
            index = _Unpickler(file).load()
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path / INDEX} is no index of a checkpoint: it names {error}, and nothing was run") from None
    except Exception as error:  # whatever a changed byte leads the reader to
        raise ValueError(f"{path / INDEX} is no index of a checkpoint: {error}") from None
    if not isinstance(index, Metadata) or index.storage_data is None:
        raise ValueError(f"{path / INDEX} is no index of a checkpoint")
    return index
