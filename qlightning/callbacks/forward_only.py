"""ForwardOnly: a LightningModule as it is, trained without backward. The optimizer is in `optim/zeroth_order.py`.

Lightning hands the optimizer a closure of training_step, zero_grad and backward. For the length of a fit, the step
is taken without autograd and in eval mode, and backward is left out, both on the Trainer's strategy; the module's
`configure_optimizers` gives way to the zeroth-order optimizer. The module's own code is not touched.
"""

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from qlightning.evaluation.modes import eval_mode
from qlightning.numerics.quantizer import Quantizer
from qlightning.optim.weights import weights_of
from qlightning.optim.zeroth_order import Restore, ZerothOrder


class ForwardOnly(Callback):
    """Trains with forward passes alone (ZeroQAT, arXiv 2509.00031), at the memory of inference.

    Replaces the module's optimizer and learning rate schedule. Both forward passes of a step see the same batch, random
    numbers and weights in eval mode (no dropout). Logs `zeroth_order/slope` and `zeroth_order/flips`, the share of
    weight codes that differ between the two passes: near 0, `eps` is too small for the grid and nothing is measured.

    Args:
        lr: Learning rate; constant.
        eps: Size of the perturbation.
        parameters: Name globs of what is trained; ("*.q_proj.weight", "*.v_proj.weight") is the paper's light variant.
        seed: Of the directions.
        restore: How parameters come back after the passes, "copy" (bit for bit) or "regenerate".
    """

    def __init__(
        self,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        parameters: Sequence[str] = ("*",),
        seed: int = 0,
        restore: Restore = "copy",
    ) -> None:
        ZerothOrder([nn.Parameter(torch.zeros(1))], lr, eps=eps, seed=seed, restore=restore)  # says what is wrong
        self.lr, self.eps, self.parameters = lr, eps, tuple(parameters)
        self.seed, self.restore = seed, restore
        self._patched: list[tuple[object, str]] = []
        self._codes: list[Tensor] | None = None
        self._flips = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        _check(trainer, pl_module)
        # no functools.wraps: Lightning would unwrap it and find the module's own
        self._patch(pl_module, "configure_optimizers", lambda: self._optimizer(pl_module))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        original: Callable[..., Any] = trainer.strategy.training_step

        def forward(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad(), eval_mode(pl_module):
                output = original(*args, **kwargs)
                if self._is_logged(trainer):
                    self._compare_codes(pl_module)
            return output

        self._patch(trainer.strategy, "training_step", forward)
        self._patch(trainer.strategy, "backward", lambda closure_loss, *args, **kwargs: closure_loss)

    def _optimizer(self, pl_module: LightningModule) -> ZerothOrder:
        named = list(pl_module.named_parameters())
        unused = [glob for glob in self.parameters if not any(fnmatchcase(name, glob) for name, _ in named)]
        if unused:
            raise ValueError(
                f"no parameter is called {unused[0]!r}; they are called for example {named[0][0]!r}: "
                f"ForwardOnly(parameters=({named[0][0]!r},))"
            )
        chosen = [p for name, p in named if any(fnmatchcase(name, glob) for glob in self.parameters)]
        rank_zero_info(f"ForwardOnly: {sum(p.numel() for p in chosen if p.requires_grad):,} parameters, no backward")
        return ZerothOrder(chosen, self.lr, eps=self.eps, seed=self.seed, restore=self.restore)

    # --- what is seen ---

    def _is_logged(self, trainer: Trainer) -> bool:
        return bool(trainer.loggers) and (trainer.global_step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def _compare_codes(self, pl_module: LightningModule) -> None:
        """Called in both passes of a step: remembers in the first, compares in the second."""
        codes = [
            quantizer.format.decode(quantizer.codes(matrix, quantizer.grid(matrix), None))
            for quantizer, matrix in _coded(pl_module)
        ]
        if self._codes is None:
            self._codes = codes
            return
        changed = sum(int((one != other).sum()) for one, other in zip(self._codes, codes, strict=True))
        self._flips, self._codes = changed / max(1, sum(each.numel() for each in codes)), None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not trainer.loggers or trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        (optimizer,) = trainer.optimizers
        assert isinstance(optimizer, ZerothOrder)
        assert optimizer.probe is not None
        slope = (optimizer.probe.plus - optimizer.probe.minus) / (2 * self.eps)
        for logger in trainer.loggers:
            logger.log_metrics({"zeroth_order/slope": slope, "zeroth_order/flips": self._flips}, trainer.global_step)

    # --- and back ---

    def _patch(self, owner: object, name: str, value: Any) -> None:
        if name in vars(owner):
            raise ValueError(
                f"{type(owner).__name__}.{name} is replaced already, by something that ForwardOnly does not know"
            )
        setattr(owner, name, value)
        self._patched.append((owner, name))

    def _unpatch(self) -> None:
        for owner, name in self._patched:
            delattr(owner, name)
        self._patched.clear()
        self._codes = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unpatch()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unpatch()


def _check(trainer: Trainer, pl_module: LightningModule) -> None:
    if not pl_module.automatic_optimization:
        raise ValueError("ForwardOnly takes the steps itself: it needs a module with automatic optimization")
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise ValueError("every process draws the same direction, for whole parameters: Trainer(strategy='ddp')")
    if trainer.accumulate_grad_batches != 1:
        raise ValueError("there are no gradients to accumulate: Trainer(accumulate_grad_batches=1), larger batches")
    if trainer.gradient_clip_val is not None:
        raise ValueError("there are no gradients to clip: leave gradient_clip_val out")
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError("there are no gradients to scale: write Trainer(precision='bf16-mixed') or '32-true'")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if getattr(callback, "needs_gradients", False):
            raise ValueError(f"{type(callback).__name__} acts on gradients, and forward-only training has none")
        if any(phase.train in ("weights", "scales") for _, phase in getattr(callback, "schedule", ())):
            raise ValueError(
                "weights or scales are held by taking their gradients away, and here there are none: leave "
                "freeze_scales and train out, and choose what is trained with ForwardOnly(parameters=('*weight',))"
            )


def _coded(module: nn.Module) -> Iterator[tuple[Quantizer, Tensor]]:
    for weight in weights_of(module):
        if isinstance(weight.quantizer, Quantizer):
            yield weight.quantizer, weight.matrix()
