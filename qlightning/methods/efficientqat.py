"""EfficientQAT: block-wise training of everything, then end-to-end training of step sizes alone."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from qlightning import solvers
from qlightning.callbacks.phase import Phase
from qlightning.callbacks.phases import places
from qlightning.methods.method import Method
from qlightning.numerics import ClippedSTE, Int, Learned, PerGroup, Quantizer


class EfficientQAT(Method):
    """Block-AP finds weights, steps and zero points block by block; the fit then trains the steps, and nothing else.

    Before the first step every block learns to return what the float block returns, its weights are rounded in place,
    and from then on codes and zero points are constant, bit for bit: what the run's own loss and learning rate train is
    one step per group. No other parameter requires a gradient, so none is made.

    Paper: EfficientQAT: Efficient Quantization-Aware Training for Large Language Models (Chen et al., ACL 2025, arXiv
    2407.11062).

    Deviations: the paper keeps packed codes in its second phase, here weights stay in the model's dtype, on their grid.
    Its learning rate for the second phase (2e-5 for 2 bits, 1e-5 for 3 and 4, warmup 3 %, gradients clipped at 0.3) is
    the module's and the Trainer's. Which layers stay in float (the paper: head and embeddings) is said with rules.
    Ranges always contain zero. Of each block the best epoch on held-out batches is kept.

    Args:
        bits: Bits of weights, with a zero point per group.
        granularity: Size of the groups of columns that share a step.
        epochs: Passes over the calibration data for each block; 0 trains the steps of weights rounded to nearest.
        weight_lr: Learning rate of weights in a block; the paper's is 2e-5 for 2 bits and 1e-5 for 3 and 4.
        quant_lr: Learning rate of steps and zero points in a block.
        held_out: Share of the calibration batches that tell when a block is done.
        batches: Number of batches of calibration data.
        scale_lr: Learning rate of the steps in the fit in units of the module's.
    """

    def __init__(
        self,
        bits: int = 2,
        *,
        granularity: int = 64,
        epochs: int = 2,
        weight_lr: float = 2e-5,
        quant_lr: float = 1e-4,
        held_out: float = 1 / 64,
        batches: int = 2048,
        scale_lr: float = 1.0,
    ) -> None:
        self.bits, self.granularity, self.epochs, self.weight_lr = bits, granularity, epochs, weight_lr
        self.quant_lr, self.held_out, self.batches, self.scale_lr = quant_lr, held_out, batches, scale_lr

    def quantization(self) -> dict[str, Any]:
        format, shared = Int(self.bits, symmetric=False), PerGroup(self.granularity)
        init = solvers.BlockAP(
            epochs=self.epochs,
            weight_lr=self.weight_lr,
            quant_lr=self.quant_lr,
            held_out=self.held_out,
            batches=self.batches,
        )
        return {
            "weight": Quantizer(format, shared, scale=Learned(rounding="frozen"), gradient=ClippedSTE(edge="code")),
            "init": init,
            "schedule": [Phase(0, quantize="all", train="scales")],
            "scale_lr": self.scale_lr,
        }

    def extras(self) -> list[Callback]:
        return [OnlySteps()]


class OnlySteps(Callback):
    """Of all parameters only the learned steps of weights require gradients for the length of a fit."""

    def __init__(self) -> None:
        self._frozen: list[Any] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scales = [place.quantizer.scale for place in places(pl_module) if place.is_weight]
        steps = {scale.value for scale in scales if isinstance(scale, Learned)}
        self._frozen = [p for p in pl_module.parameters() if p.requires_grad and p not in steps]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._thaw()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._thaw()

    def _thaw(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []
