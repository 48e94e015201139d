"""Reading a Lightning checkpoint: the file, and the class where it is not one of ours, give the trained module back."""

import inspect
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from qlightning.callbacks import loading  # noqa: F401  (from here on every LightningModule converts what it loads)
from qlightning.checkpoints import read_checkpoint
from qlightning.export.sharded import read_sharded
from qlightning.shards import is_sharded

_EXAMPLE = "write for example runs/quickstart/checkpoints/last.ckpt"
_TASKS, _DATA = "qlightning.tasks", "qlightning.data"


def load_trained(checkpoint: str | Path, *, model: str | type[LightningModule] | None = None) -> LightningModule:
    """The trained module in eval mode, on the CPU. Nothing in the file is run: it is read with `weights_only=True`.

    Args:
        checkpoint: A Lightning checkpoint: a file, or a folder of shards.
        model: The module's class or its dotted path; left out for the tasks of qlightning, which their hyperparameters
            tell apart.

    Raises:
        ValueError: There is no such file, or the class cannot be told, found, or built from the hyperparameters.
    """
    return trained_in(read_lightning(checkpoint), model=model)


def trained_in(saved: dict[str, Any], *, model: str | type[LightningModule] | None = None) -> LightningModule:
    """As `load_trained`, of a checkpoint that is read already."""
    options = dict(saved.get("hyper_parameters") or {})
    cls = _find(model, options) if model is None or isinstance(model, str) else model
    module = _build(cls, options, saved.get("hparams_name"))
    if is_overridden("configure_model", module):
        module.configure_model()
    module.on_load_checkpoint(saved)
    _cast_like(module, saved["state_dict"])
    module.load_state_dict(saved["state_dict"], strict=module.strict_loading)
    return module.eval()


def read_lightning(checkpoint: str | Path) -> dict[str, Any]:
    """What is in a Lightning checkpoint: plain data, and tensors that are mapped and not read.

    A folder of shards is gathered without the states of its optimizers.

    Raises:
        ValueError: There is no such file or folder, or it is none.
    """
    path = Path(checkpoint)
    if is_sharded(path):
        return read_sharded(path)
    if not path.is_file():
        what = "a folder, but not one of shards" if path.is_dir() else "not there"
        raise ValueError(f"checkpoint {path} is {what}; {_EXAMPLE}")
    # mapped, not read: the optimizer's states, which are twice the model, never come into memory
    saved = read_checkpoint(path)
    if "state_dict" not in saved or "pytorch-lightning_version" not in saved:
        raise ValueError(
            f"{path} is no Lightning checkpoint; write one with ModelCheckpoint or trainer.save_checkpoint"
        )
    return saved


def _cast_like(module: LightningModule, state: Mapping[str, Any]) -> None:
    """Weights are trained in the dtype the run chose, which the module alone does not know."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in state and state[name].is_floating_point() and parameter.is_floating_point():
            parameter.data = parameter.data.to(state[name].dtype)


def _find(path: str | None, options: Mapping[str, Any]) -> type[LightningModule]:
    if path is None:
        return _task_of(options)
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"model={path!r} cannot be imported ({error}); write for example my_package.my_file.MyModule"
        ) from None
    if not (isinstance(found, type) and issubclass(found, LightningModule)):
        raise ValueError(f"model={path!r} is no LightningModule")
    return found


def _task_of(options: Mapping[str, Any]) -> type[LightningModule]:
    """The task of qlightning whose arguments these are. A class that only the file names is never imported."""
    given = {name for name in options if not name.startswith("_")}
    tasks = import_module(_TASKS)
    for name in tasks.__all__:
        task = getattr(tasks, name)
        if isinstance(task, type) and issubclass(task, LightningModule) and _arguments(task) == given:
            return task
    named = options.get("_class_path")
    hint = f"model={named!r} (--model {named})" if named else "model='my_package.my_file.MyModule' (--model ...)"
    raise ValueError(f"the checkpoint is of none of qlightning's tasks: name its class, {hint}")


def _arguments(cls: type) -> set[str]:
    return {name for name in inspect.signature(cls.__init__).parameters if name != "self"}  # type: ignore[misc]


def _build(cls: type[LightningModule], options: dict[str, Any], hparams_name: str | None) -> LightningModule:
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    options = {name: value for name, value in options.items() if not name.startswith("_")}
    if hparams_name and hparams_name in parameters:
        options = {hparams_name: options}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        options = {name: value for name, value in options.items() if name in parameters}
    try:
        return cls(**options)
    except TypeError as error:
        raise ValueError(
            f"{cls.__name__} cannot be built from the checkpoint's hyperparameters ({error}): call "
            "self.save_hyperparameters() in its __init__, or build and load it yourself and use "
            "qlightning.export.export_module(module, ...)"
        ) from None


def run_data(checkpoint: str | Path) -> LightningDataModule | None:
    """The datamodule of the run that wrote a checkpoint, where its config.yaml names one of qlightning's, or None.

    Only classes of qlightning.data are built: a file beside a checkpoint must not choose what code is run.
    """
    folder = Path(checkpoint).absolute().parent
    config = next((path for up in (folder, folder.parent) if (path := up / "config.yaml").is_file()), None)
    if config is None:
        return None
    import yaml

    described = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("data")
    if not isinstance(described, dict):
        return None
    package = import_module(_DATA)
    name = str(described.get("class_path", "")).removeprefix(f"{_DATA}.")
    if name not in package.__all__:
        return None
    datamodule: LightningDataModule = getattr(package, name)(**(described.get("init_args") or {}))
    return datamodule
