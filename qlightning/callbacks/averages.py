"""Averaged copies of the module (EMA, stochastic weight averaging) are told what phases change."""

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel

from qlightning.layers.convert import quantizers_of
from qlightning.numerics.tensor_quantizer import TensorQuantizer


def tell_averages(trainer: Trainer, pl_module: LightningModule, switched: Sequence[TensorQuantizer]) -> None:
    """Let averaged copies of the module be in its phase; past averages of what was just switched mean nothing."""
    new = {id(quantizer) for quantizer in switched}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if not isinstance(average, nn.Module):
            continue
        copies = dict(quantizers_of(average.module if isinstance(average, AveragedModel) else average))
        for name, quantizer in quantizers_of(pl_module):
            # a strength is a buffer while there is one, and averaging pairs buffers by their order
            copies[name].set_strength(1.0 if quantizer.strength is None else float(quantizer.strength))
            if id(quantizer) in new:
                copies[name].load_state_dict(quantizer.state_dict())
            else:
                copies[name].set_extra_state(quantizer.get_extra_state())
