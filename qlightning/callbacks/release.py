"""Release: single matrix products of quantized layers go back to float late in a run."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from qlightning.callbacks.averages import tell_averages
from qlightning.callbacks.order import qat_before
from qlightning.callbacks.phase import check_time
from qlightning.callbacks.qat import is_rehearsal
from qlightning.layers.layer import Twin
from qlightning.numerics.tensor_quantizer import TensorQuantizer
from qlightning.schedules.steps import to_steps

Product = Literal["fprop", "dgrad", "wgrad"]


class Release(Callback):
    """From one step on, the operands of some products of all layers are no longer quantized.

    "fprop" is the forward pass: weights and inputs, also in evaluation, so the model that comes out is a float model.
    Backward goes on as it was where a layer's scheme has a `backward`. "dgrad" and "wgrad" are the input's and the
    weight's gradient; released, they have the operands of fprop. Put it behind QATCallback.

    Recovering forward late: NVFP4 pre-training (arXiv 2509.25149); backward: FP4 All the Way (arXiv 2505.19115).

    Args:
        products: What is released: "fprop", "dgrad", "wgrad".
        at: From when on: an optimizer step (int) or a share of the run (float).

    Raises:
        ValueError: A product or time cannot be meant; from fit, when nothing there could be released.
    """

    def __init__(self, products: Sequence[Product] = ("fprop",), *, at: int | float = 0.9) -> None:
        self.products: tuple[Product, ...] = tuple(products)
        if not self.products or set(self.products) - set(get_args(Product)):
            raise ValueError(f"products={products!r}: write some of 'fprop', 'dgrad' and 'wgrad', as a list")
        self.at = check_time("at", at)
        self._step: int | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(products=self.products, at=self.at)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step = state_dict["step"]  # a share of the run stays the step it was

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        qat_before(self, trainer)
        if stage == "fit" and trainer.global_step == 0:  # it may have been in another run; a checkpoint is loaded later
            self._step = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._step is None:
            total = trainer.estimated_stepping_batches
            self._step = to_steps(self.at, total)
            if self._step >= total and not is_rehearsal(trainer):
                raise ValueError(f"Release(at={self.at}): the run ends at step {int(total)}; write for example at=0.9")
        for product in self.products:
            if not any(True for _ in _operands(pl_module, product)):
                raise ValueError(
                    f"Release({list(self.products)!r}): no operand of {product} has a quantizer; give layers one with "
                    "Scheme(..., backward=Backward(grad_dgrad='nvfp4-sr', grad_wgrad='nvfp4-sr'))"
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._step is not None
        if trainer.global_step < self._step:
            return
        acting = [q for product in self.products for q in _operands(pl_module, product) if q.enabled]
        for quantizer in acting:
            quantizer.release()
        if acting:
            tell_averages(trainer, pl_module, acting)
            products = " and ".join(self.products)
            rank_zero_info(
                f"Release: {products} in float from step {trainer.global_step} on ({len(acting)} quantizers)"
            )


def _operands(module: LightningModule, product: Product) -> Iterator[TensorQuantizer]:
    """The quantizers of a product's operands in all layers of a module."""
    for layer in module.modules():
        if not isinstance(layer, Twin):
            continue
        if product == "fprop":
            acting = {*layer.prefixes("input"), *layer.weights()} if "weight" in layer.placements else set()
            yield from (quantizer for prefix, quantizer in layer.quantizers() if prefix in acting)
        elif (backward := layer.backward_part()) is not None:
            yield from backward.operands(product)
