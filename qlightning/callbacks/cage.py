"""CAGECallback: the pull toward the grid in a Lightning run. What it computes is in `optim/cage.py`."""

from functools import partial

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from qlightning.callbacks.after_step import AfterStep
from qlightning.optim.cage import Cage, Mode, Ramp, pull_strength
from qlightning.optim.weights import check_quantized, shares_of


class CAGECallback(Callback):
    """Pulls weights toward their quantization grid, more and more in the last part of the run (arXiv 2510.18784).

    Stands after the QATCallback. It works beside any optimizer and its schedule; before quantization begins there is
    nothing to pull to. With `mode="coupled"` the pull is clipped together with the gradient.

    Args:
        strength: The pull at the end of the run; its product with the learning rate must be below 1.
        silence: Share of the run without a pull.
        ramp: "linear" from the end of the silence to the end of the run, or "none" for the full strength at once.
        mode: "decoupled" from the optimizer's step and memory, or "coupled" through the gradient.
    """

    needs_gradients = True

    def __init__(
        self, strength: float = 10.0, silence: float = 0.8, *, ramp: Ramp = "linear", mode: Mode = "decoupled"
    ) -> None:
        if not strength >= 0 or not 0 <= silence < 1:
            raise ValueError(
                f"strength={strength}, silence={silence}: a strength that is not negative and a share of the run below "
                "1, for example CAGECallback(strength=10.0, silence=0.8)"
            )
        if ramp not in ("linear", "none"):
            raise ValueError(f"ramp={ramp!r}: write ramp='linear' or ramp='none'")
        self.strength, self.silence, self.ramp, self.mode = strength, silence, ramp, mode
        self._cage = Cage(mode)
        self._after = AfterStep()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_quantized(pl_module, "CAGECallback()")
        if trainer.estimated_stepping_batches == float("inf"):
            raise ValueError("the pull is a function of the share of the run done: write Trainer(max_steps=10_000)")
        self._after.attach(trainer, self._cage.after)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Here the gradients are there and the weights have not moved: what is measured is e_t at x_t."""
        total = trainer.estimated_stepping_batches
        now = partial(pull_strength, strength=self.strength, silence=self.silence, ramp=self.ramp)
        strength = now(trainer.global_step, total)
        self._cage.before(optimizer, shares_of(pl_module) if strength else (), strength=strength)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._after.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._after.detach()
