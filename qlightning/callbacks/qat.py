"""QATCallback: quantization-aware training of any LightningModule.

It decides when things happen; `layers/convert.py` decides where, and `numerics/quantizer.py` what.
"""

import os
import zipfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import register_type
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from qlightning.callbacks.averages import tell_averages
from qlightning.callbacks.conversion import Conversion
from qlightning.callbacks.optimizers import Memory, separate_scales
from qlightning.callbacks.phases import Phases, advance_rounding, places
from qlightning.evaluation.random_state import random_state, restore_random_state
from qlightning.layers.convert import Tied, convert, convert_present, quantizers_of, restore
from qlightning.layers.coverage import Coverage, count_multiply_adds
from qlightning.layers.rules import EVERYTHING, Rules, RuleValue
from qlightning.layers.scheme import Scheme
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.spec import describe, rebuild
from qlightning.schedules.steps import to_steps

if TYPE_CHECKING:
    Spec = str | Quantizer
else:  # for the CLI, which reads a spec into a Quantizer while it parses, so that a wrong one is an error of the option
    Spec = Quantizer


class QATCallback(Callback):
    """Trains a model for the bits it will be served with.

    Example::

        trainer = Trainer(callbacks=[QATCallback(weight="int4-g128", input="int8-token")])
        trainer.fit(any_lightning_module, any_datamodule)

    The module is converted when it is complete and before it is sharded, its optimizers are built and checkpoints are
    loaded; see `layers/convert.py`. Put it before callbacks that copy the module (weight averaging).

    Args:
        weight: Spec of every layer's weight, for example "int4-g128"; None leaves weights in float.
        input: Spec of every layer's input, for example "int8-token".
        output: Spec of every layer's output.
        kv_cache: Spec of keys and values in attention layers of transformers models.
        attention: Spec of attention probabilities in transformers models.
        rules: Schemes of particular layers by name glob or "type:Class"; the last rule that matches a layer decides. A
            value is a weight spec, a mapping such as {weight: int8, input: int8-token}, or null for float.
        start: When quantization begins: an optimizer step (int) or a fraction of the run (float below 1).
        freeze_scales: When learned and observed scales are fixed, likewise; None never.
        calibration: Optimizer steps in which static scales of activations observe before they act.
        scale_lr: Learning rate of learned scales in units of their layer's.
        tied: A weight shared by two layers stays in "float", or both quantize it alike ("share").
        min_coverage: Smallest share of the weights nobody chose to leave in float that must be converted.

    Raises:
        ValueError: From the constructor for a wrong spec, rule or time; from fit for a rule that cannot act.
    """

    def __init__(
        self,
        weight: Spec | None = None,
        input: Spec | None = None,
        *,
        output: Spec | None = None,
        kv_cache: Spec | None = None,
        attention: Spec | None = None,
        rules: dict[str, Any] | None = None,
        start: int | float = 0,
        freeze_scales: int | float | None = None,
        calibration: int = 8,
        scale_lr: float = 0.1,
        tied: Tied = "float",
        min_coverage: float = 0.5,
    ) -> None:
        scheme = Scheme(weight, input=input, output=output, kv_cache=kv_cache, attention=attention)
        given: dict[str, RuleValue] = {EVERYTHING: scheme if dict(scheme.items()) else None, **(rules or {})}
        if all(value is None for value in given.values()):
            raise ValueError("QATCallback quantizes nothing; write for example QATCallback(weight='int4-g128')")
        Rules(given)
        self.rules, self.tied, self.min_coverage = given, tied, min_coverage
        self.start = _check_time("start", start)
        self.freeze_scales = None if freeze_scales is None else _check_time("freeze_scales", freeze_scales)
        if calibration < 1:
            raise ValueError(f"calibration={calibration}: at least one step, for example QATCallback(calibration=8)")
        if not scale_lr >= 0:
            raise ValueError(f"scale_lr={scale_lr}: not negative, for example QATCallback(scale_lr=0.1)")
        self.calibration, self.scale_lr = calibration, scale_lr
        self.coverage: Coverage | None = None
        self.phases: Phases | None = None
        self._resumed: dict[str, Any] | None = None
        self._conversion = Conversion()
        self._fresh = False
        self._counting: Any = None
        self._memory: Memory | None = None
        self._before_validation: tuple[dict[str, Any], list[Quantizer]] | None = None

    # --- conversion ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert now, and again after whatever hook of the user's may still build or load modules."""
        self._check_order(trainer)
        self._resumed = None
        self._fresh = stage == "fit" and not any(True for _ in quantizers_of(pl_module))
        self._conversion.begin(pl_module, self._convert)

    def _convert(self, pl_module: LightningModule, complete: bool) -> None:
        if not complete:
            convert_present(pl_module, Rules(self.rules), tied=self.tied)
            return
        first = self.coverage is None
        self.coverage = convert(pl_module, self.rules, tied=self.tied, min_coverage=self.min_coverage)
        self._keep_observations_apart(pl_module)
        if self._fresh:  # whoever runs the module before the fit begins (a learning rate finder) runs its first phase
            for _, quantizer in quantizers_of(pl_module):
                quantizer.enabled = quantizer.ready and not self.start
        if first:
            rank_zero_info(f"QATCallback:\n{self.coverage.table()}")

    def _keep_observations_apart(self, pl_module: LightningModule) -> None:
        """DDP overwrites every rank's buffers with the first rank's; what ranks observe is pooled instead."""
        observing = {id(place.quantizer) for place in places(pl_module) if place.observes}
        observed = (
            f"{name}.scale.{buffer}"
            for name, quantizer in quantizers_of(pl_module)
            if id(quantizer) in observing
            for buffer, _ in quantizer.scale.named_buffers()
        )
        self._conversion.keep_apart(pl_module, observed)

    def _check_order(self, trainer: Trainer) -> None:
        mine = trainer.callbacks.index(self)  # type: ignore[attr-defined]
        for other in trainer.callbacks[:mine]:  # type: ignore[attr-defined]
            if isinstance(other, WeightAveraging | StochasticWeightAveraging):
                name = type(other).__name__
                raise ValueError(
                    f"{name} copies the module before it is converted; put QATCallback first: "
                    f"Trainer(callbacks=[QATCallback(...), {name}(...)])"
                )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._conversion.end(pl_module)

    # --- the run ---

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scales = _learned_beside(pl_module)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._memory = Memory(trainer.optimizers, scales)
        separate_scales(trainer.optimizers, schedulers, scales, rate=self.scale_lr)
        start, freeze = self._resolve(trainer)
        times: dict[str, Any] = {"start": start, "calibration": self.calibration, "freeze": freeze}
        self.phases = Phases(pl_module, **times, reduce=_sum_over(trainer), processes=trainer.world_size)
        if self._resumed is None and trainer.global_step == 0:
            self.phases.begin()
            self._check_calibration(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fresh = False
        self._log_coverage(trainer)

    def _resolve(self, trainer: Trainer) -> tuple[int, int | None]:
        if self._resumed is not None and tuple(self._resumed["given"]) == (self.start, self.freeze_scales):
            return self._resumed["start"], self._resumed["freeze"]  # a share of the run stays the step it was
        if self._resumed is None and trainer.global_step and self.phases is not None:  # the same Trainer fits on
            return self.phases.start, self.phases.freeze
        start = _resolve("start", self.start, trainer)
        return start, None if self.freeze_scales is None else _resolve("freeze_scales", self.freeze_scales, trainer)

    def _check_calibration(self, trainer: Trainer) -> None:
        assert self.phases is not None
        late = self.phases.waits_for()
        if late and self.calibration >= (total := trainer.estimated_stepping_batches) and not is_rehearsal(trainer):
            raise ValueError(
                f"calibration={self.calibration}: {late[0].name} would only act after that many steps, but the run "
                f"ends at step {int(total)}; write for example calibration={max(1, int(total) // 4)}"
            )

    def _log_coverage(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(self.coverage.metrics() if self.coverage else {}, step=trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self.phases is not None
        if self._resumed is not None:
            self._continue(trainer)
        switched = self.phases.apply(trainer.global_step)
        if switched:
            assert self._memory is not None
            self._memory.forget(p for quantizer in switched for p in quantizer.learned())
            tell_averages(trainer, pl_module, switched)
            rank_zero_info(f"QATCallback: {len(switched)} quantizers act from step {trainer.global_step} on")
        advance_rounding(pl_module)
        if self.coverage is not None and self.coverage.multiply_add_share is None and not _is_compiled(pl_module):
            self._counting = count_multiply_adds(pl_module, self.coverage)
            self._counting.__enter__()

    def _continue(self, trainer: Trainer) -> None:
        """Draw the random numbers that the interrupted run would have drawn next."""
        assert self._resumed is not None
        if trainer.world_size == 1 and self._resumed["random"] is not None:
            restore_random_state(self._resumed["random"])
        self._resumed["random"] = None
        # Lightning, resumed from the end of an epoch, does not count the next one as begun: a second resume would err.
        progress: Any = trainer.fit_loop.epoch_progress
        if progress.current.ready == progress.current.processed:
            progress.increment_ready()
            progress.increment_started()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._stop_counting(trainer)  # checkpointed layers run again in backward and must not be counted twice

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._stop_counting(trainer)
        assert self.phases is not None
        self.phases.pool()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning leaves teardown out then. A fit that never began leaves a plain module behind."""
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self._counting = None
        self._conversion.end(pl_module)
        if self._fresh:
            restore(pl_module)
        if (path := trainer.ckpt_path) and os.path.isfile(path) and not zipfile.is_zipfile(path):
            exception.add_note(f"{path} is no whole checkpoint: resume from another one, fit(..., ckpt_path='last')")

    def _stop_counting(self, trainer: Trainer) -> None:
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self._counting = None
            assert self.coverage is not None
            rank_zero_info(f"QATCallback: {self.coverage.table().splitlines()[-1]}")
            self._log_coverage(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation leaves no trace in training: a run resumed from a step behind it does not repeat it."""
        if trainer.state.fn == TrainerFn.FITTING:
            observing = [quantizer for _, quantizer in quantizers_of(pl_module) if quantizer.observing]
            self._before_validation = random_state(), observing
            for quantizer in observing:
                quantizer.observing = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._before_validation is not None:
            random, observing = self._before_validation
            self._before_validation = None
            restore_random_state(random)
            for quantizer in observing:
                quantizer.observing = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Frozen scales have no gradient, so no optimizer moves them, not even by momentum."""
        if self.phases is not None and self.phases.frozen(trainer.global_step):
            for scale in _learned_beside(pl_module):
                scale.grad = None

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """Only plain data: loads with `weights_only=True` under every strategy."""
        if self.phases is None:
            return {}
        return {
            "start": self.phases.start,
            "freeze": self.phases.freeze,
            "given": (self.start, self.freeze_scales),
            "random": random_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = dict(state_dict) if state_dict else None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        tell_averages(trainer, pl_module, [])  # an averaging callback writes its copy in place of the module


def _check_time(name: str, value: int | float) -> int | float:
    try:
        to_steps(value, 1_000_000)
    except ValueError as error:
        raise ValueError(f"{name}={value!r}: {error}") from None
    return value


def _resolve(name: str, value: int | float, trainer: Trainer) -> int:
    if not value:
        return 0
    total = trainer.estimated_stepping_batches
    if isinstance(value, float) and total == float("inf"):
        raise ValueError(
            f"{name}={value}: a share of a run without end; write {name}=1000 for a step, or give the run an end, "
            "Trainer(max_steps=10_000)"
        )
    step = to_steps(value, total)
    if step >= total and not is_rehearsal(trainer):
        raise ValueError(f"{name}={value}: the run ends at step {int(total)}; write for example {name}=0.5")
    return step


def is_rehearsal(trainer: Trainer) -> bool:
    """Whether the run only tries out that everything runs; it need not last until quantization begins."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _learned_beside(module: nn.Module) -> dict[nn.Parameter, list[nn.Parameter]]:
    """Every learned scale, with the parameters of the layer that it belongs to."""
    return {
        scale: list(place.layer.parameters(recurse=False))
        for place in places(module)
        for scale in place.quantizer.learned()
    }


def _is_compiled(module: LightningModule) -> bool:
    return module._compiler_ctx is not None or any(
        hasattr(child, "_orig_mod") or child._compiled_call_impl is not None for child in module.modules()
    )


def _sum_over(trainer: Trainer) -> Callable[[Tensor], Tensor]:
    def reduce(tensor: Tensor) -> Tensor:
        reduced: Tensor = trainer.strategy.reduce(tensor, reduce_op="sum")  # type: ignore[assignment]
        return reduced

    return reduce


def _read_spec(value: Any) -> Quantizer:
    if isinstance(value, Quantizer):
        return value
    quantizer = rebuild(value)
    if not isinstance(quantizer, Quantizer):
        raise ValueError(f"{value!r} describes no quantizer; write a spec, for example 'int4-g128'")
    return quantizer


# So a LightningCLI, also a user's own, reads specs from YAML and options, and prints them back.
register_type(Quantizer, serializer=describe, deserializer=_read_spec, fail_already_registered=False)
