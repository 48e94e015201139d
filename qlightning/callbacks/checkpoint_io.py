"""How a Trainer writes and reads checkpoints: see `qlightning/checkpoints.py` and `qlightning/shards.py`."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from qlightning.callbacks.shard_io import keep_shards_whole
from qlightning.checkpoints import check_whole, write_checkpoint
from qlightning.shards import is_sharded, write_shards


class WholeCheckpoints(CheckpointIO):
    """Local checkpoints are written whole or not at all and checked before they are read; others are Lightning's.

    Every run with a QATCallback has it. Any other: `Trainer(plugins=[qlightning.WholeCheckpoints()])`.
    """

    def __init__(self) -> None:
        self._remote = TorchCheckpointIO()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is None and _is_local_file_protocol(path):
            write_checkpoint(checkpoint, path)
        else:
            self._remote.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(  # type: ignore[override]  # Lightning's own file reader has these arguments, too
        self,
        path: Any,
        map_location: Any = "cpu",  # not Lightning's function of that meaning, which tensor subclasses do not take
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Only plain data and tensors, unless the user has told the Trainer otherwise, fit(weights_only=False)."""
        if _is_local_file_protocol(path):
            check_whole(path)
        plain = True if weights_only is None else weights_only
        loaded: dict[str, Any] = self._remote.load_checkpoint(path, map_location, weights_only=plain)
        return loaded

    def save_shards(self, states: Mapping[str, Any], rest: bytes, path: Any) -> None:
        """As `write_shards`; every process must call it."""
        write_shards(states, rest, path)

    def remove_checkpoint(self, path: Any) -> None:
        if _is_local_file_protocol(path) and is_sharded(Path(path)):  # first its name, so that half of it is none
            nameless = Path(path).with_name(f".removed-{Path(path).name}")
            shutil.rmtree(nameless, ignore_errors=True)  # of a process that was killed here
            shutil.rmtree(Path(path).rename(nameless))
        else:
            self._remote.remove_checkpoint(path)


def keep_checkpoints_whole(trainer: Trainer) -> None:
    """Replace the reader and writer of files and shards that a Trainer has when nobody chose one.

    Raises:
        ValueError: What was chosen cannot act.
    """
    io = trainer.strategy.checkpoint_io
    if type(io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpoints()
    elif isinstance(io, _WrappingCheckpointIO) and type(io.checkpoint_io) is TorchCheckpointIO:
        io._checkpoint_io = WholeCheckpoints()  # the property's setter keeps what is there
    if callable(attach := getattr(io, "attach", None)):
        attach(trainer)
    keep_shards_whole(trainer.strategy, WholeCheckpoints())
