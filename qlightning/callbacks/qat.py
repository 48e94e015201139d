"""QATCallback: quantization-aware training of any LightningModule.

It decides when things happen; `layers/convert.py` decides where, and `numerics/quantizer.py` what.
"""

from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from qlightning.callbacks.averages import tell_averages
from qlightning.callbacks.batches import CalibrationBatches
from qlightning.callbacks.checkpoint_io import keep_checkpoints_whole
from qlightning.callbacks.conversion import Conversion
from qlightning.callbacks.counting import Counting
from qlightning.callbacks.optimizers import Memory, Rates, separate_scales
from qlightning.callbacks.phase import Phase, Spec, phases_of
from qlightning.callbacks.phases import Phases, advance_rounding, learned_beside, places
from qlightning.callbacks.ranks import own_states, restore_own, sum_over
from qlightning.callbacks.stages import AsConverted, Stages, load_in_stage, plan_stages
from qlightning.callbacks.timeline import Timeline, resolve
from qlightning.evaluation.random_state import random_state, restore_random_state
from qlightning.layers.convert import Tied, convert, convert_present, quantizers_of, restore
from qlightning.layers.coverage import Coverage
from qlightning.layers.rules import EVERYTHING, Rules, RuleValue
from qlightning.layers.scheme import Scheme
from qlightning.layers.sharding import is_sharded, refuse_flat, refuse_parallel, whole
from qlightning.numerics.tensor_quantizer import TensorQuantizer
from qlightning.schedules.learning_rate import Schedule
from qlightning.solvers.fixed import fix_scales
from qlightning.solvers.solver import Solver


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
        ramp: Steps, or fraction of the run, over which the strength of quantization grows to full; see `Phase`.
        anneal: Later formats by the time at which they begin, for example {0.5: "int6-g32", 0.8: "int4-g32"}: a weight
            spec or a mapping of placements, such as {0.95: {"input": "int4-token"}}, for the layers that no other of
            the `rules` decides. Granularity and kind of scale stay those of the first format.
        freeze_scales: When learned and observed scales are fixed, likewise; None never.
        schedule: The phases of the run, in place of the four shorthands before; see `Phase`.
        init: Finds the quantized weights from data, once, when weights begin to be quantized, on what
            `datamodule.calibration_dataloader()` returns or else on the first batches of the training data; several
            processes share its batches out.
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
        ramp: int | float = 0,
        anneal: dict[Any, Any] | None = None,
        freeze_scales: int | float | None = None,
        schedule: list[Phase] | None = None,
        init: Solver | None = None,
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
        self.start = start
        self.schedule = phases_of(schedule, start=start, ramp=ramp, anneal=anneal, freeze_scales=freeze_scales)
        if init is not None and init.final:
            raise ValueError(f"init={init!r} leaves nothing to train: use its method, or qlightning.solvers.calibrate")
        self._ordered, self.init = schedule is not None, init
        if calibration < 1:
            raise ValueError(f"calibration={calibration}: at least one step, for example QATCallback(calibration=8)")
        if not scale_lr >= 0:
            raise ValueError(f"scale_lr={scale_lr}: not negative, for example QATCallback(scale_lr=0.1)")
        self.calibration, self.scale_lr = calibration, scale_lr
        self.coverage: Coverage | None = None
        self.phases: Phases | None = None
        self._timeline: Timeline | None = None
        self._stages: list[Stages] = []
        self._resumed: dict[str, Any] | None = None
        self._conversion = Conversion()
        self._fresh = self._initialized = False
        self._rates: Rates | None = None
        self._counting = Counting()
        self._memory: Memory | None = None
        self._before_validation: tuple[dict[str, Any], list[TensorQuantizer]] | None = None

    # --- conversion ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert now, and again after whatever hook of the user's may still build or load modules."""
        self._check_order(trainer)
        keep_checkpoints_whole(trainer)
        self._resumed = self._timeline = None
        self._fresh = stage == "fit" and not any(True for _ in quantizers_of(pl_module))
        self._initialized = self._initialized and not self._fresh
        self._conversion.begin(pl_module, self._convert)

    def _convert(self, pl_module: LightningModule, complete: bool) -> None:
        with AsConverted(pl_module):
            if not complete:
                convert_present(pl_module, Rules(self.rules), tied=self.tied)
                return
            first = self.coverage is None
            self.coverage = convert(pl_module, self.rules, tied=self.tied, min_coverage=self.min_coverage)
            if self.init is not None:  # a solution lies on the grid on which it was found
                with whole(pl_module):
                    fix_scales(pl_module)
            self._stages = plan_stages(pl_module, self.rules, [phase.rules for _, phase in self.schedule])
        if any(self._stages):
            self._conversion.put(pl_module, "load_state_dict", load_in_stage(pl_module))
        self._keep_observations_apart(pl_module)
        self._tell_schedules(pl_module)
        if self._fresh:  # whoever runs the module before the fit begins (a learning rate finder) runs its first phase
            at_once = {placement for _, phase in self.schedule if not phase.at for placement in phase.quantize}
            for place in places(pl_module):
                place.quantizer.enabled = place.quantizer.ready and place.placement in at_once
        if first:
            rank_zero_info(f"QATCallback:\n{self.coverage.table()}")

    def _tell_schedules(self, pl_module: LightningModule) -> None:
        """Let learning rate schedules that the module keeps know where quantization begins."""
        for schedule in vars(pl_module).values():
            if isinstance(schedule, Schedule):
                schedule.bind(lambda: self.timeline(pl_module.trainer).start)

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
        if sum(isinstance(callback, QATCallback) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError(
                "a Trainer takes one QATCallback; say what differs between layers in rules and between steps in a "
                "schedule: QATCallback(weight='int4-g128', rules={'lm_head': 'int8-channel'}, schedule=[...])"
            )
        mine = trainer.callbacks.index(self)  # type: ignore[attr-defined]
        for other in trainer.callbacks[:mine]:  # type: ignore[attr-defined]
            if isinstance(other, WeightAveraging | StochasticWeightAveraging):
                name = type(other).__name__
                raise ValueError(
                    f"{name} copies the module before it is converted; put QATCallback first: "
                    f"Trainer(callbacks=[QATCallback(...), {name}(...)])"
                )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(trainer, pl_module)

    def _let_go(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._conversion.end(pl_module)
        if self._rates is not None:
            self._rates.remove()
            self._rates = None
        for schedule in vars(pl_module).values():
            if isinstance(schedule, Schedule):
                schedule.bind(None)

    # --- the run ---

    def timeline(self, trainer: Trainer) -> Timeline:
        """The phases at their steps in a trainer's run."""
        if self._timeline is None:

            def end() -> float:
                return trainer.estimated_stepping_batches

            if (known := self._known_times(trainer)) is not None:
                at, ramp = known
                self._timeline = Timeline([phase for _, phase in self.schedule], at=at, ramp=ramp, end=end)
            else:
                rehearsal = is_rehearsal(trainer)
                self._timeline = resolve(self.schedule, end=end, ordered=self._ordered, rehearsal=rehearsal)
        return self._timeline

    def _known_times(self, trainer: Trainer) -> tuple[list[int], list[int]] | None:
        """What shares of the run stood for when it began; a run that lasts longer does not move them."""
        if self._resumed is not None:
            return (self._resumed["at"], self._resumed["ramp"]) if self._resumed["given"] == self._given() else None
        if trainer.global_step and self.phases is not None:  # the same Trainer fits on
            return self.phases.timeline.at, self.phases.timeline.ramp
        return None

    def _given(self) -> list[list[int | float]]:
        return [[phase.at, phase.ramp] for _, phase in self.schedule]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_parallel(pl_module)
        if self.init is not None and not self._initialized:
            assert trainer.strategy.model is not None
            refuse_flat(trainer.strategy.model, f"init={self.init!r}")
        scales = learned_beside(pl_module)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        timeline, fresh = self.timeline(trainer), self._resumed is None and trainer.global_step == 0
        resets = any(phase.optimizer == "reset" for _, phase in self.schedule)
        self._memory = Memory(trainer.optimizers, pl_module.parameters() if resets else scales)
        separate_scales(trainer.optimizers, schedulers, scales, rate=self.scale_lr)
        if timeline.changes_rates:
            self._rates = Rates(trainer.optimizers, self._rate)
        before = -1 if fresh else self._resumed["step"] if self._resumed else self.phases.step if self.phases else -1
        shared: dict[str, Any] = {"reduce": sum_over(trainer), "processes": trainer.world_size}
        shared["whole"] = partial(whole, root=trainer.strategy.model)
        self.phases = Phases(
            pl_module, timeline=timeline, calibration=self.calibration, stages=self._stages, step=before, **shared
        )
        if fresh:
            self.phases.begin()
            self._check_calibration(trainer)

    def _rate(self, scales: bool) -> float:
        assert self.phases is not None
        return self.phases.timeline.rate(self.phases.step, scales=scales)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fresh = False
        self._log_coverage(trainer)

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
        self._enter_phase(trainer, pl_module)
        advance_rounding(pl_module)
        self._counting.begin(pl_module, self.coverage)

    def _enter_phase(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.phases is not None
        assert self._memory is not None
        step = trainer.global_step
        reached, strengths = self.phases.timeline.reached(self.phases.step, step), self.phases.strengths()
        switched = self.phases.apply(step)
        if any(entry.phase.optimizer == "reset" for entry in reached):
            self._memory.forget(pl_module.parameters())
        if switched:
            self._memory.forget(p for quantizer in switched for p in quantizer.learned())
            rank_zero_info(f"QATCallback: {len(switched)} quantizers act or change their format from step {step} on")
        if switched or strengths != self.phases.strengths():
            tell_averages(trainer, pl_module, switched)
        for entry in reached if self._ordered else ():
            rank_zero_info(f"QATCallback: from step {step} on {entry.phase!r}")
        if self.init is not None and not self._initialized and self.phases.acts("weight"):
            self._initialize(trainer, pl_module, self.init)

    def _initialize(self, trainer: Trainer, pl_module: LightningModule, solver: Solver) -> None:
        from qlightning.solvers import calibrate

        report = calibrate(pl_module, CalibrationBatches(trainer, solver.batches), solver)
        self._initialized = True
        rank_zero_info(f"QATCallback: weights found by {solver!r} at step {trainer.global_step}\n{report.table()}")

    def _continue(self, trainer: Trainer) -> None:
        """Draw the random numbers that the interrupted run would have drawn next, in every process."""
        assert self._resumed is not None
        if (states := self._resumed.pop("own", None)) is not None:
            restore_own(states, trainer, trainer.lightning_module)
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
        self._counting.end()
        self._let_go(trainer, pl_module)
        if self._fresh and not any(is_sharded(parameter) for parameter in pl_module.parameters()):
            restore(pl_module)  # what is sharded cannot be used without a Trainer anyway

    def _stop_counting(self, trainer: Trainer) -> None:
        if self._counting.end():
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
        """What a phase does not train has no gradient, so no optimizer moves it, not even by momentum."""
        if self.phases is None or (trains := self.phases.timeline.trains(self.phases.step)) == "all":
            return
        scales = learned_beside(pl_module)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if (parameter in scales) == (trains == "weights"):
                    parameter.grad = None

    # --- checkpoints ---
    # Not `state_dict`: of two callbacks with one, Lightning says less than `_check_order` does.

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Only plain data: loads with `weights_only=True` under every strategy."""
        tell_averages(trainer, pl_module, [])  # an averaging callback writes its copy in place of the module
        if self.phases is not None:
            own = {"step": self.phases.step, "initialized": self._initialized, "own": own_states(trainer, pl_module)}
            checkpoint["callbacks"][self.state_key] = {**self.described(), "given": self._given(), **own}

    def described(self) -> dict[str, Any]:
        """The phases of the run and the coverage as plain data, for checkpoints and reports."""
        times = self.phases.timeline.plain() if self.phases is not None else {}
        coverage = self.coverage.plain() if self.coverage is not None else []
        return {**times, "calibration": self.calibration, "coverage": coverage}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        self._resumed = dict(state) if state else None
        self._timeline = None
        if state:
            self._initialized = state["initialized"]


def is_rehearsal(trainer: Trainer) -> bool:
    """Whether the run only tries out that everything runs; it need not last until quantization begins."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
