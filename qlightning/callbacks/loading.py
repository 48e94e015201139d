"""A converted checkpoint loads into the plain LightningModule it came from.

Every quantizer describes itself in the state dict (`Quantizer.get_extra_state`), so who loads one can convert first.
`LightningModule.load_state_dict` is the one method behind `load_from_checkpoint`, `Trainer.predict(ckpt_path=...)` and
its like, and plain loading; it is inherited from torch untouched, and `install` gives LightningModule its own.
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from qlightning.layers.convert import quantizers_of, restore
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


def install() -> None:
    """Make every LightningModule load converted checkpoints. Called when qlightning is imported beside Lightning."""
    LightningModule.load_state_dict = load_state_dict  # type: ignore[method-assign, assignment]
