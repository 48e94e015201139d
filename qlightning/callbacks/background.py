"""BackgroundCheckpoints: checkpoints are written beside the training, which waits only while its state is copied."""

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

from qlightning.callbacks.checkpoint_io import WholeCheckpoints
from qlightning.shards import write_shards


class BackgroundCheckpoints(CheckpointIO):
    """Writes checkpoints in the background, as files or as folders of shards, whole or not at all.

    Example::

        Trainer(strategy=QuantizedFSDP(), plugins=[BackgroundCheckpoints()], callbacks=[QATCallback("int4-g128")])

    In YAML it is one line of the trainer, `plugins: qlightning.BackgroundCheckpoints`, under every strategy of
    Lightning's that writes files, and under FSDPStrategy, ModelParallelStrategy and QuantizedFSDP where they write
    shards. A save copies the state to the memory of the CPU and returns; the next one waits until it is done, so there
    is never more than one copy. Whatever goes wrong is raised, in every process of a sharded run, by the next save or
    at the end of the fit, which waits for the last. A checkpoint that the new one replaces is removed when the new one
    is there. Outside of a fit, `trainer.save_checkpoint` writes at once.

    Sharded runs find it where there is a QATCallback, and in `qlightning fit`.
    """

    def __init__(self) -> None:
        self._files = WholeCheckpoints()
        self._queue = Queue()
        self._group: dist.ProcessGroup | None = None
        self._trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> None:
        """Tell it whose fits it writes for.

        Raises:
            ValueError: A callback would link to a checkpoint that is not there yet.
        """
        self._trainer = trainer
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_last == "link":
                raise ValueError(
                    "save_last='link' would point to a checkpoint that is still being written: write "
                    "ModelCheckpoint(save_last=True) beside BackgroundCheckpoints()"
                )

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self._do(partial(self._files.save_checkpoint, self._kept(checkpoint), path, storage_options))

    def save_shards(self, states: Mapping[str, Any], rest: bytes, path: Any) -> None:
        """As `write_shards`; every process must call it."""
        if self._group is None:  # its own, since messages of two threads in one group could be taken for each other
            self._group = dist.new_group(backend="gloo")
        self._do(partial(write_shards, self._kept(states), rest, path, group=self._group))

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._queue.wait()
        return self._files.load_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        self._queue.then(partial(self._files.remove_checkpoint, path))

    def teardown(self) -> None:
        """Wait for the last save."""
        try:
            self._queue.end()
        finally:
            if self._group is not None and dist.is_initialized():
                dist.destroy_process_group(self._group)
            self._group = None

    def _running(self) -> bool:
        return self._trainer is None or self._trainer.state.status is TrainerStatus.RUNNING

    def _kept(self, state: Any) -> Any:
        self._queue.wait()  # before there is a second copy
        return staged(state, {}) if self._running() else state

    def _do(self, save: Callable[[], None]) -> None:
        if self._running():
            self._queue.begin(save)
        else:
            save()


class Queue:
    """Does one thing after another in a thread. After a failure, which `wait` raises, what was left is not done."""

    def __init__(self) -> None:
        self._worker: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []

    def begin(self, act: Callable[[], None]) -> None:
        """Wait for what was begun before, raise what went wrong there, and do this."""
        self.wait()
        self.then(act)

    def then(self, act: Callable[[], None]) -> None:
        """Do this when everything before it is done."""
        before = list(self._pending)
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending.append(self._worker.submit(_after, before, act))

    def wait(self) -> None:
        """Until everything is done. Raises the first failure, once."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.exception()
        for future in pending:
            future.result()

    def end(self) -> None:
        """As `wait`, and let the thread go."""
        try:
            self.wait()
        finally:
            if self._worker is not None:
                self._worker.shutdown()
                self._worker = None


def _after(before: list[Future[None]], act: Callable[[], None]) -> None:
    if not any(future.exception() for future in before):
        act()


def staged(state: Any, copies: dict[int, Any]) -> Any:
    """A copy of a state on the CPU, that shares nothing with it. Tensors of one storage have one in the copy, too.

    Args:
        state: Tensors, subclasses of them that wrap others (DTensor) and plain data, in dicts, lists and tuples.
        copies: By storage, those that were made already; a new dictionary for the outermost call.
    """
    if isinstance(state, Tensor):
        return _copied(state.detach(), copies)
    if isinstance(state, dict):
        new = copy.copy(state)  # with what state dicts carry beside their items
        for key, value in state.items():
            new[key] = staged(value, copies)
        return new
    if type(state) in (list, tuple):
        return type(state)(staged(value, copies) for value in state)
    return copy.deepcopy(state)


def _copied(tensor: Tensor, copies: dict[int, Any]) -> Tensor:
    if isinstance(tensor, ShardedTensor):  # of FSDP1
        shards = [Shard(_copied(shard.tensor, copies), shard.metadata) for shard in tensor.local_shards()]
        group = tensor._process_group
        same: Tensor = ShardedTensor._init_from_local_shards_and_global_metadata(shards, tensor.metadata(), group)
        return same
    if hasattr(tensor, "__tensor_flatten__"):  # torch's contract with what wraps tensors
        names, context = tensor.__tensor_flatten__()
        inside = {name: getattr(tensor, name) for name in names}
        inside = {name: _copied(x, copies) if isinstance(x, Tensor) else x for name, x in inside.items()}
        kind: Any = type(tensor)
        wrapped: Tensor = kind.__tensor_unflatten__(inside, context, tensor.size(), tensor.stride())
        return wrapped
    storage = tensor.untyped_storage()
    if (key := storage._cdata) not in copies:
        copies[key] = torch.UntypedStorage(storage.nbytes()).copy_(storage)
    plain = torch.empty(0, dtype=tensor.dtype)
    return plain.set_(copies[key], tensor.storage_offset(), tensor.size(), tensor.stride())
