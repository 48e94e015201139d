"""Teachers: where a frozen model comes from, how it stays the same for a whole run, and after a resume."""

import copy
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from qlightning.checkpoints import read_checkpoint
from qlightning.evaluation.modes import silent
from qlightning.evaluation.random_state import random_state, restore_random_state
from qlightning.folders import sync
from qlightning.layers.convert import restore
from qlightning.losses.taps import ITSELF, partner
from qlightning.strategies.fsdp import QuantizedFSDP

SELF = "self"
"""The teacher that is the module as it is when the run begins."""


class Teacher:
    """A model that nothing changes: frozen, in eval mode, on the student's device, without a trace in the run.

    Args:
        module: The model.
        trainer: The Trainer of the run, whose precision it takes on.
    """

    def __init__(self, module: nn.Module, trainer: Trainer) -> None:
        self.module = module.requires_grad_(False).eval()
        trainer.precision_plugin.convert_module(self.module)
        self.module.to(trainer.strategy.root_device)
        if isinstance(module, LightningModule):
            module.trainer = trainer
        self._digest: str | None = None
        if isinstance(trainer.strategy, QuantizedFSDP):
            self._digest = self.digest  # while every process has all of it
            trainer.strategy.shard_frozen(self.module)
        self._marks = self._look()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around everything it computes: no gradients, no logs, and the student's random numbers stay where they are.

        Raises:
            ValueError: It changed itself.
        """
        before = random_state()
        try:
            with silent(self.module), torch.no_grad():
                yield
        finally:
            restore_random_state(before)
        if changed := [name for name, mark in self._look().items() if self._marks.get(name) != mark]:
            raise ValueError(
                f"the teacher's own step overwrites its {changed[0]}, so it would not stay the same: let it only "
                "answer what a submodule of the student is asked, for example DistillationCallback(at='model')"
            )

    def _look(self) -> dict[str, tuple[int, int]]:
        return {name: (id(tensor), tensor._version) for name, tensor in _tensors(self.module).items()}

    @property
    def digest(self) -> str:
        """SHA-256 of all parameters and buffers, with their names, dtypes and shapes."""
        if self._digest is None:
            self._digest = _digest(_tensors(self.module))
        return self._digest

    def save(self, folder: Path) -> Path:
        """Write it into `folder`, under a name that tells it from every other teacher; done once."""
        from safetensors.torch import save_file

        path = folder.resolve() / f"teacher-{self.digest[:16]}.safetensors"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f"{os.getpid()}-{path.name}")
            save_file({name: tensor.contiguous() for name, tensor in _tensors(self.module).items()}, unfinished)
            sync(unfinished)
            os.replace(unfinished, path)
            sync(folder)
        return path

    def load(self, path: Path) -> None:
        """Become what `save` wrote. Raises ValueError for a file of another model."""
        from safetensors.torch import load_file

        stored, mine = load_file(path), _tensors(self.module)
        if _digest(stored)[:16] not in path.name:
            raise ValueError(f"{path} is not what was written: the file is damaged; begin the run anew")
        wrong = sorted(stored.keys() ^ mine.keys()) or [n for n in mine if stored[n].shape != mine[n].shape]
        if wrong:
            raise ValueError(
                f"{path} is no teacher of this module: {wrong[0]} is missing on one side, or of other shape"
            )
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(stored[name])
        self._marks, self._digest = self._look(), None


def build(source: str | nn.Module, trainer: Trainer, pl_module: LightningModule, at: str | None) -> nn.Module:
    """The teacher that a user names, with the weights it has at this moment.

    Args:
        source: "self", path of a checkpoint, or a module.
        trainer: The Trainer of the run.
        pl_module: The student, complete and perhaps converted.
        at: The submodule in whose place the teacher stands, or None for a teacher of the student's own kind.

    Raises:
        ValueError: No such file, a file of another model, a module that is part of the student or misses its `at`.
    """
    if isinstance(source, str):
        whole: nn.Module = _copied(trainer, pl_module) if source == SELF else _loaded(source, trainer, pl_module)
    else:
        whole = source
        if isinstance(whole, LightningModule) and is_overridden("configure_model", whole):
            whole.trainer = trainer  # which knows the data, from which some modules take their sizes
            with trainer.precision_plugin.module_init_context():
                whole.configure_model()
        _check_apart(whole, pl_module)
    if at is not None:
        return student_root(whole, at) if isinstance(whole, LightningModule) else whole
    if not isinstance(whole, LightningModule):
        children = [name for name, _ in pl_module.named_children()] or [ITSELF]
        raise ValueError(
            f"a {type(whole).__name__} has no training_step: say which submodule of {type(pl_module).__name__} it does "
            f"the work of, for example DistillationCallback(teacher, at={children[0]!r})"
        )
    return whole


def student_root(pl_module: nn.Module, at: str | None) -> nn.Module:
    """What the student's names are relative to. Raises ValueError if there is no such submodule."""
    return pl_module if at is None else partner(pl_module, at, ()).module


def _copied(trainer: Trainer, pl_module: LightningModule) -> LightningModule:
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise ValueError(
            "a sharded module cannot be copied as it is: write teacher='path/to/float.ckpt', or give a module, "
            "DistillationCallback(teacher=MyModule(...))"
        )
    whole = copy.deepcopy(pl_module)
    mine = vars(pl_module)
    compiled = pl_module._compiler_ctx is not None
    for name, value in list(vars(whole).items()):
        # A function that stands on the instance (a callback's hook, torch.compile's step) would run the student.
        if value is mine[name] and callable(value) and hasattr(LightningModule, name):
            if name in ("forward", "training_step") and not compiled and not hasattr(value, "total"):
                raise ValueError(
                    f"{name} was replaced on this one {type(whole).__name__}, so no copy has it: write it into the "
                    "class, or give the teacher yourself, DistillationCallback(teacher=...)"
                )
            del vars(whole)[name]
    whole._compiler_ctx = None
    restore(whole)
    return whole


def _loaded(path: str, trainer: Trainer, pl_module: LightningModule) -> LightningModule:
    kind = type(pl_module)
    if not Path(path).expanduser().is_file():
        raise ValueError(f"teacher={path!r} is no file: write the path of a checkpoint, 'self', or give a module")
    checkpoint = read_checkpoint(Path(path).expanduser())
    try:
        if "hyper_parameters" in checkpoint:  # then it need not be of the student's size
            return kind.load_from_checkpoint(path, map_location="cpu", weights_only=True)
        whole = _copied(trainer, pl_module)
        whole.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, TypeError, KeyError) as error:
        raise ValueError(
            f"teacher={path!r} is no checkpoint of a {kind.__name__} like this one ({error}); build the teacher "
            f"yourself, DistillationCallback(teacher={kind.__name__}.load_from_checkpoint(...))"
        ) from error
    return whole


def _check_apart(teacher: nn.Module, student: nn.Module) -> None:
    mine = {key for parameter in student.parameters() for key in _identity(parameter)}
    for name, parameter in teacher.named_parameters():
        if mine & _identity(parameter):
            raise ValueError(
                f"the teacher's {name} is a parameter of the student, which would be frozen: write teacher='self', or "
                "give a copy, DistillationCallback(teacher=copy.deepcopy(model))"
            )


def _identity(parameter: Tensor) -> set[Any]:
    local = getattr(parameter, "_local_tensor", parameter)
    pointer = local.untyped_storage().data_ptr()
    return {id(parameter)} | ({(str(local.device), pointer)} if pointer else set())


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, tied ones once."""
    return dict(module.named_parameters()) | dict(module.named_buffers())
