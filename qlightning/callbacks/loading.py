"""A converted checkpoint loads into the plain LightningModule it came from.

Every quantizer describes itself in the state dict (`Quantizer.get_extra_state`), so who loads one can convert first.
`LightningModule.load_state_dict` is the one method behind `load_from_checkpoint`, `Trainer.predict(ckpt_path=...)` and
its like, and plain loading; it is inherited from torch untouched, and `install` gives LightningModule its own. A
ModelParallelStrategy goes past it where a checkpoint is one file; `through_module` leads it there.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from qlightning.callbacks.shard_io import check_together
from qlightning.checkpoints import read_checkpoint
from qlightning.layers.convert import quantizers_of, restore
from qlightning.layers.sharding import is_sharded, shared_out
from qlightning.layers.swap import convert_like


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


def through_module(strategy: ModelParallelStrategy) -> Callable[..., dict[str, Any]]:
    """A `load_checkpoint` that gives a file's tensors to the module's `load_state_dict`, and folders as ever.

    Lightning's own sets parameters and buffers one by one, so that which quantizers act would come from nowhere.
    """
    original = strategy.load_checkpoint

    def load_checkpoint(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(strategy.broadcast(checkpoint_path))
        if not path.is_file():
            check_together(strategy, path)
            return original(checkpoint_path, weights_only)
        # every process reads the file, which is mapped, and keeps its share
        checkpoint = read_checkpoint(path)
        module = strategy.lightning_module
        assert module is not None
        module.load_state_dict(_shares(checkpoint.pop("state_dict"), module), strict=module.strict_loading)
        for optimizer, state in zip(strategy.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            _load_optimizer(module, optimizer, state)
        return checkpoint

    return load_checkpoint


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


def install() -> None:
    """Make every LightningModule load converted checkpoints. Called when qlightning is imported beside Lightning."""
    LightningModule.load_state_dict = load_state_dict  # type: ignore[method-assign, assignment]
