"""A converted checkpoint loads into the plain LightningModule it came from.

Every quantizer describes itself in the state dict (`Quantizer.get_extra_state`), so who loads one can convert first.
`LightningModule.load_state_dict` is the one method behind `load_from_checkpoint`, `Trainer.predict(ckpt_path=...)` and
its like, and plain loading; it is inherited from torch untouched, and `install` gives LightningModule its own.
Strategies that shard load after they have sharded, when nothing can be converted any more: they say so. A
ModelParallelStrategy goes past the module where a checkpoint is one file, and is led there.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from qlightning.callbacks.shard_io import check_together
from qlightning.checkpoints import read_checkpoint, strings_in
from qlightning.layers.convert import quantizers_of, restore
from qlightning.layers.coverage import public_name
from qlightning.layers.sharding import is_sharded, shared_out
from qlightning.layers.swap import convert_like
from qlightning.shards import REST, read_index


def load_state_dict(self: LightningModule, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """As `torch.nn.Module.load_state_dict`, after converting the layers whose quantizers the state dict describes."""
    plain = not any(True for _ in quantizers_of(self))
    convert_like(self, state_dict)
    try:
        return nn.Module.load_state_dict(self, state_dict, *args, **kwargs)
    except RuntimeError:
        if plain:
            restore(self)
        raise


def _from_file(strategy: ModelParallelStrategy, path: Path) -> dict[str, Any]:
    """As Lightning loads a file under a strategy that shards, but through the module's `load_state_dict`.

    Lightning's own sets parameters and buffers one by one, so that which quantizers act would come from nowhere.
    """
    checkpoint = read_checkpoint(path)  # every process reads the file, which is mapped, and keeps its share
    module = strategy.lightning_module
    assert module is not None
    module.load_state_dict(_shares(checkpoint.pop("state_dict"), module), strict=module.strict_loading)
    for optimizer, state in zip(strategy.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
        _load_optimizer(module, optimizer, state)
    return checkpoint


def _shares(state_dict: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    own = module.state_dict()
    return {
        name: shared_out(value, own[name]) if name in own and is_sharded(own[name]) else value
        for name, value in state_dict.items()
    }


def _load_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    if any(isinstance(key, int) for key in state["state"]):  # written by name where Lightning could
        state = _by_name(module, optimizer, state)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(module, optimizer, optim_state_dict=state, options=options)


def _by_name(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Numbers count the optimizer's parameters (one process) or the module's (Lightning, sharded): places tell."""
    own = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = list(zip(state["param_groups"], optimizer.param_groups, strict=True))
    names = {
        number: own[id(parameter)]
        for saved, live in groups
        for number, parameter in zip(saved["params"], live["params"], strict=True)
    }
    named = [{**saved, "params": [names[number] for number in saved["params"]]} for saved, _ in groups]
    return {"state": {names[number]: value for number, value in state["state"].items()}, "param_groups": named}


_DESCRIPTION = "_quantizer._extra_state"


def _sharded(load: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The `load_checkpoint` of a strategy that shards, for checkpoints and modules that may be converted.

    Raises:
        ValueError: The checkpoint has quantizers that the module, sharded by now, does not have.
    """

    @wraps(load)
    def load_checkpoint(self: Any, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path, module = Path(self.broadcast(checkpoint_path)), self.lightning_module
        check_together(self, path)
        has = {public_name(name) for name, _ in quantizers_of(module)}
        saved = (
            name.removesuffix("._extra_state") for name in _names_in(path, weights_only) if name.endswith(_DESCRIPTION)
        )
        if missing := list(dict.fromkeys(name.rpartition(".")[0] for name in saved if name not in has)):
            shown = ", ".join(missing[:3]) + " ..." * bool(missing[3:])
            raise ValueError(
                f"{path} quantizes {shown}, but {type(module).__name__} was sharded in float, and would run so: give "
                "the Trainer the callback of the run that wrote it, callbacks=[QATCallback(...)], or call "
                "qlightning.convert(self, ...) at the start of configure_model"
            )
        if has and path.is_file() and isinstance(self, ModelParallelStrategy):
            return _from_file(self, path)
        return load(self, checkpoint_path, weights_only)

    return load_checkpoint


def _names_in(path: Path, weights_only: bool | None) -> Iterable[str]:
    """Names in the module's state that a checkpoint holds; none where whoever loads it will say what is wrong."""
    if path.is_file() and weights_only is False:  # it may hold anything: Lightning will run it, nothing here does
        return strings_in(path)
    if path.is_file():
        return read_checkpoint(path).get("state_dict", ())
    if not (path / REST).is_file():
        return ()
    return (name.partition(".")[2] for name in read_index(path).state_dict_metadata)  # after the name of the state


def install() -> None:
    """Make every LightningModule load converted checkpoints. Called when qlightning is imported beside Lightning."""
    if LightningModule.load_state_dict is load_state_dict:
        return
    LightningModule.load_state_dict = load_state_dict  # type: ignore[method-assign, assignment]
    for strategy in (ModelParallelStrategy, FSDPStrategy):
        strategy.load_checkpoint = _sharded(strategy.load_checkpoint)  # type: ignore[method-assign, assignment]
