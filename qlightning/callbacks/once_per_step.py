"""OncePerStep: weights are quantized once per optimizer step, whatever number of micro-batches it has."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from qlightning.callbacks.order import qat_before
from qlightning.layers.kept_weight import KeptWeight
from qlightning.layers.layer import Twin
from qlightning.layers.prepare import prepare
from qlightning.numerics.tensor_quantizer import TensorQuantizer


class OncePerStep(Callback):
    """Keeps each quantized weight from its first use in an optimizer step to the step itself.

    The forward and backward passes of all micro-batches under gradient accumulation, and all layers that share a
    weight, then use the same bits that they would have made anew. It pays with gradient accumulation and with weights
    that are called often; it costs a copy of the quantized weights in the dtype they are multiplied in (2 bytes per
    weight under bf16) while gradients are computed. Stochastic rounding draws anew for every micro-batch with it as
    without it, so only forward and backward of one micro-batch share a draw.

    Under torch.compile, of the module or of parts of it, the quantized weights are made before the first micro-batch
    and read by compiled code; that is linear layers and convolutions whose rounding is to nearest and whose scale does
    not move with the data. There is no graph break, and no compilation more.

    Put it behind QATCallback. It has no state: a run may be resumed with it or without it.

    Raises:
        ValueError: From fit, when no QATCallback stands before it.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        qat_before(self, trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for quantizer in _weight_quantizers(pl_module):
            quantizer.kept = KeptWeight()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Free them before the optimizer needs memory; what it does to `.data` has no version."""
        _clear(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """What was made in validation goes too: it may have been made on averaged weights."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            _clear(pl_module)
            with trainer.precision_plugin.forward_context():
                for layer in _compiled_layers(pl_module):
                    prepare(layer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for quantizer in _weight_quantizers(pl_module):
            quantizer.kept = None


def _compiled_layers(module: LightningModule) -> Iterator[Twin]:
    """The layers in those parts of a module that torch.compile has taken over, each once."""
    whole = module._compiler_ctx is not None  # type: ignore[attr-defined]
    parts = [m for m in module.modules() if whole or m._compiled_call_impl is not None or hasattr(m, "_orig_mod")]
    yield from {id(layer): layer for part in parts for layer in part.modules() if isinstance(layer, Twin)}.values()


def _clear(module: LightningModule) -> None:
    for quantizer in _weight_quantizers(module):
        if quantizer.kept is not None:
            quantizer.kept.clear()


def _weight_quantizers(module: LightningModule) -> list[TensorQuantizer]:
    return [
        quantizer
        for layer in module.modules()
        if isinstance(layer, Twin)
        for name, quantizer in layer.quantizers()
        if name in layer.weights()
    ]
