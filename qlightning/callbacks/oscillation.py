"""Weights that hop between two codes: watched, damped, frozen, or left as the only ones that move.

What is computed for one weight is in `optim/oscillation.py`. Everything acts around the optimizer's step, on gradients
and weights themselves, and needs no term in the loss.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from qlightning.callbacks.after_step import AfterStep
from qlightning.numerics.spec import describe
from qlightning.numerics.tensor_quantizer import State
from qlightning.optim.oscillation import Tracker, coded, elementwise, positions, threshold_distance
from qlightning.optim.weights import Weight, check_quantized, learning_rates, shares_of
from qlightning.schedules.steps import to_steps


class Reading(NamedTuple):
    """What is logged of one weight.

    Attributes:
        flips: Share of its codes that change in a step, averaged since the last reading.
        oscillating: Share of its codes whose oscillation frequency is above the threshold.
        distance: Mean distance to the nearest threshold between codes, in gaps between codes.
        frozen: Share of its codes that are held.
    """

    flips: float
    oscillating: float
    distance: float
    frozen: float


class OscillationCallback(Callback):
    """Watches code changes of quantized weights; damps or freezes what oscillates, if so wished.

    Logs `flips/<weight>`, `oscillating/<weight>`, `threshold_distance/<weight>` and `frozen/<weight>` every
    `log_every_n_steps` steps of the Trainer, and writes `oscillation.png` into `folder` at the end.

    After Overcoming Oscillations in Quantization-Aware Training (Nagel et al., ICML 2022, arXiv 2203.11086), from
    memory. Dampening is the gradient of `dampening_t * sum (w - Q(w))^2` over weights inside the range, added to the
    gradient by hand, so the loss that is logged stays the task's; `dampening_t` grows along half a cosine, from 0 to
    `dampening` at the end of the run. Freezing holds a weight at the code nearest to its mean. Deviation: where the
    scale is measured on the weights themselves (absmax), the value is held and not the code, since codes that follow
    the scale that follows the codes would shrink together.

    It keeps about 10 bytes per weight, of sharded ones (FSDP2) for the rows of each process. Scales that are functions
    of more than a row are then measured on weights that are gathered for it, layer by layer.

    Args:
        threshold: Oscillation frequency from which an element counts as oscillating.
        momentum: Weight of the present step in the averages.
        dampening: Strength of the dampening at the end of the run; 0 for none.
        freezing: Oscillation frequency above which an element is frozen; None for none.
        freeze_from: When freezing begins: an optimizer step (int) or a share of the run (float).
        folder: Where the picture goes; the run folder of the Trainer when not given.
    """

    def __init__(
        self,
        threshold: float = 0.005,
        momentum: float = 0.01,
        *,
        dampening: float = 0.0,
        freezing: float | None = None,
        freeze_from: int | float = 0,
        folder: str | None = None,
    ) -> None:
        if not 0 < momentum < 1 or not 0 < threshold < 1:
            raise ValueError(
                f"threshold={threshold}, momentum={momentum}: both in (0, 1), for example OscillationCallback(0.005, "
                "0.01)"
            )
        if not dampening >= 0:
            raise ValueError(f"dampening={dampening}: not negative, for example OscillationCallback(dampening=1e-3)")
        if freezing is not None and not 0 < freezing < 1:
            raise ValueError(f"freezing={freezing}: a frequency in (0, 1), for example freezing=0.02")
        self.threshold, self.momentum, self.folder = threshold, momentum, folder
        self.dampening, self.freezing, self.freeze_from = dampening, freezing, freeze_from
        self.history: dict[str, list[tuple[float, ...]]] = {}
        self._trackers: dict[str, Tracker] = {}
        self._kept: dict[str, Tensor] = {}
        self._seen: dict[str, Weight] = {}
        self._formats: dict[str, str] = {}
        self._after = AfterStep()
        self._loaded: dict[str, Any] = {}
        self._read_at = -1
        self._resolved: tuple[int | float, int] | None = None
        to_steps(freeze_from, 1_000_000)
        if freeze_from and freezing is None:
            raise ValueError(f"freeze_from={freeze_from} freezes nothing: add a frequency, for example freezing=0.02")

    @property
    def needs_gradients(self) -> bool:
        """Whether it cannot act where training makes none."""
        return self.dampening > 0

    # --- the run ---

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_quantized(pl_module, "OscillationCallback()")
        if trainer.global_step == 0:  # this callback may have watched another run
            self.history, self._trackers, self._kept, self._formats, self._loaded = {}, {}, {}, {}, {}
            self._read_at = -1
        if self.dampening and trainer.estimated_stepping_batches == float("inf"):
            raise ValueError("the dampening grows to the end of the run: write Trainer(max_steps=10_000)")
        self._freeze_step = _resolve(self.freeze_from, self._resolved, trainer)
        self._resolved = self.freeze_from, self._freeze_step
        self._after.attach(trainer, lambda optimizer: self._step(trainer, pl_module, optimizer))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self.dampening:
            return
        progress = (trainer.global_step + 1) / trainer.estimated_stepping_batches
        strength = self.dampening * (1 - math.cos(math.pi * min(1.0, progress))) / 2
        moved = learning_rates(optimizer)
        for weight in shares_of(pl_module):
            p = weight.parameter
            if id(p) in moved and p.grad is not None:
                p.grad += weight.like_parameter(2 * strength * _inside_error(weight))

    @torch.no_grad()
    def _step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        moved = learning_rates(optimizer)
        for weight in shares_of(pl_module):
            if id(weight.parameter) not in moved and weight.layer.inside() is None:
                continue
            tracker = self._tracker(weight)
            quantizer = coded(weight) if self.freezing is None else elementwise(weight)
            static = quantizer.scale.static
            state = weight.state(weight.matrix()) if static else None
            self._hold(weight, tracker, state)
            matrix = weight.matrix()
            state = weight.state(matrix) if state is None else state
            tracker.update(quantizer.codes(matrix, state, None), quantizer.format)
            if self.freezing is not None and trainer.global_step >= self._freeze_step:
                held_before = tracker.frozen
                tracker.freeze(self.freezing, quantizer.format)
                if not static:
                    self._keep_values(weight, tracker, matrix, state, new=tracker.frozen & ~held_before)
                self._hold(weight, tracker, state)

    def _tracker(self, weight: Weight) -> Tracker:
        """The weight's own, a new one where its codes have another meaning since the last step."""
        format = describe(weight.quantizer.format)
        self._seen[weight.name] = weight
        if weight.name in self._loaded:
            state = self._loaded.pop(weight.name)
            tracker, rows = Tracker(momentum=self.momentum), weight.rows
            of_tracker = state["tracker"] if rows is None else _by_row(state["tracker"], rows.cut)
            tracker.load_state_dict(of_tracker, device=weight.parameter.device)
            self._trackers[weight.name], self._formats[weight.name] = tracker, state["format"]
            if (kept := state["kept"]) is not None:
                self._kept[weight.name] = (kept if rows is None else rows.cut(kept)).to(weight.parameter.device)
        if self._formats.get(weight.name) != format:
            self._trackers[weight.name], self._formats[weight.name] = Tracker(momentum=self.momentum), format
            self._kept.pop(weight.name, None)
        return self._trackers[weight.name]

    def _keep_values(self, weight: Weight, tracker: Tracker, matrix: Tensor, state: State, *, new: Tensor) -> None:
        held = elementwise(weight).decode(tracker.held, state).to(matrix.dtype)
        self._kept[weight.name] = torch.where(new, held, self._kept.get(weight.name, matrix))

    def _hold(self, weight: Weight, tracker: Tracker, state: State | None) -> None:
        """Put frozen elements back: to their codes on the scale as it is, or to their values."""
        if not tracker.begun or self.freezing is None or not bool(tracker.frozen.any()):
            return
        if weight.quantizer.scale.static:
            assert state is not None
            values = elementwise(weight).decode(tracker.held, state)
        else:
            values = self._kept[weight.name]
        _put(weight, tracker.frozen, values)

    # --- what is seen ---

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step == self._read_at or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        self._read_at = step
        readings = {w.name: self._read(w) for w in shares_of(pl_module) if self._begun(w)}
        names = {"flips": "flips", "oscillating": "oscillating", "distance": "threshold_distance", "frozen": "frozen"}
        metrics: dict[str, float] = {}
        for name, reading in readings.items():
            self.history.setdefault(name, []).append((step, *reading))
            metrics |= {f"{names[field]}/{name}": value for field, value in reading._asdict().items()}
        for logger in trainer.loggers if metrics else []:
            logger.log_metrics(metrics, step=step)

    def _begun(self, weight: Weight) -> bool:
        return weight.name in self._trackers and self._trackers[weight.name].begun

    @torch.no_grad()
    def _read(self, weight: Weight) -> Reading:
        tracker, quantizer, matrix = self._trackers[weight.name], coded(weight), weight.matrix()
        v = positions(quantizer, matrix, weight.state(matrix))
        means = [
            tracker.take_flip_rate(),
            float((tracker.frequency > self.threshold).float().mean()),
            float(threshold_distance(v, quantizer.format).mean()),
            float(tracker.frozen.float().mean()),
        ]
        rows = weight.rows
        return Reading(*(means if rows is None else rows.pooled(means)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._after.detach()
        folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)  # log_dir asks all processes
        if trainer.is_global_zero and self.history:
            folder.mkdir(parents=True, exist_ok=True)
            draw(self.history, folder / "oscillation.png", threshold=self.threshold)
            rank_zero_info(f"OscillationCallback: written to {folder}: oscillation.png")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._after.detach()

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        weights = {}
        for name, tracker in self._trackers.items():
            if tracker.begun:
                state, kept, rows = tracker.state_dict(), self._kept.get(name), self._seen[name].rows
                if rows is not None:  # every process has its rows, and a checkpoint all
                    state = _by_row(state, rows.gathered)
                    kept = None if kept is None else rows.gathered(kept)
                weights[name] = {"tracker": state, "format": self._formats[name], "kept": kept}
        return {
            "weights": {**self._loaded, **weights},
            "history": self.history,
            "read_at": self._read_at,
            "resolved": self._resolved,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded, self.history = dict(state_dict["weights"]), dict(state_dict["history"])
        self._trackers, self._kept, self._formats = {}, {}, {}
        self._read_at, self._resolved = state_dict["read_at"], state_dict["resolved"]


class ConfidenceAnnealing(Callback):
    """Lets only weights near a threshold between two codes move, so that the rest of a run settles them.

    Confidence-guided annealing of OFQ (Liu et al., ICML 2023): weights farther than `boundary` from every threshold get
    no gradient and their value back after the step, which momentum and weight decay would have moved; which ones is
    asked anew in every step. Where the scale moves with the weights, a held weight can still change its code.

    Stands after the QATCallback.

    Args:
        boundary: Distance from a threshold within which a weight may move, in gaps between codes; the paper's BR.
        start: When it begins, after ordinary training: an optimizer step (int) or a share of the run (float).
    """

    needs_gradients = True

    def __init__(self, boundary: float = 0.005, start: int | float = 0.9) -> None:
        if not 0 < boundary < 0.5:
            raise ValueError(f"boundary={boundary}: in (0, 0.5), for example ConfidenceAnnealing(boundary=0.005)")
        to_steps(start, 1_000_000)
        self.boundary, self.start = boundary, start
        self._held: dict[int, list[tuple[Weight, Tensor, Tensor]]] = {}
        self._after = AfterStep()
        self._begin = 0
        self._resolved: tuple[int | float, int] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_quantized(pl_module, "ConfidenceAnnealing()")
        self._begin = _resolve(self.start, self._resolved, trainer)
        self._resolved = self.start, self._begin
        self._after.attach(trainer, self._restore)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        held = self._held[id(optimizer)] = []
        if trainer.global_step < self._begin:
            return
        moved = learning_rates(optimizer)
        for weight in shares_of(pl_module):
            p = weight.parameter
            if id(p) not in moved or p.grad is None:
                continue
            quantizer, matrix = elementwise(weight), weight.matrix()
            v = positions(quantizer, matrix, weight.state(matrix))
            confident = threshold_distance(v, quantizer.format) > self.boundary
            p.grad.masked_fill_(weight.like_parameter(confident.to(matrix.dtype)) != 0, 0.0)
            held.append((weight, confident, matrix.clone()))

    def _restore(self, optimizer: Optimizer) -> None:
        for weight, confident, before in self._held.pop(id(optimizer), []):
            _put(weight, confident, before)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def _detach(self) -> None:
        self._held.clear()
        self._after.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"resolved": self._resolved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resolved = state_dict["resolved"]


def _resolve(moment: int | float, resolved: tuple[int | float, int] | None, trainer: Trainer) -> int:
    """The step of a moment; a share of the run stays the step it was when the run is resumed."""
    if resolved is not None and resolved[0] == moment and trainer.global_step:
        return resolved[1]
    return to_steps(moment, trainer.estimated_stepping_batches)


def _by_row(state: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A tracker's state with another number of rows."""
    return {k: change(v) if isinstance(v, Tensor) and v.dim() else v for k, v in state.items()}


def _inside_error(weight: Weight) -> Tensor:
    """w - Q(w), and 0 where w lies outside the range: its distance from the range is no oscillation."""
    quantizer, matrix = elementwise(weight), weight.matrix()
    state = weight.state(matrix)
    v = positions(quantizer, matrix, state)
    outside = (v < quantizer.format.low) | (v > quantizer.format.high)
    return (matrix - quantizer.on_grid(matrix, state, None)).masked_fill(outside, 0.0)


@torch.no_grad()
def _put(weight: Weight, where: Tensor, values: Tensor) -> None:
    """Write values (of the matrix's shape) into the Parameter where the mask says so, and nowhere else."""
    p = weight.parameter
    mask = weight.like_parameter(where.to(p.dtype)) != 0
    p.copy_(torch.where(mask, weight.like_parameter(values.to(p.dtype)), p))


def draw(history: dict[str, list[tuple[float, ...]]], path: Path, *, threshold: float) -> None:
    """The curves of all weights, first layers dark and last ones light."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    titles = (
        "codes that change in a step (%)",
        f"codes that oscillate, frequency > {threshold:g} (%)",
        "mean distance to a threshold (codes)",
        "frozen codes (%)",
    )
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flatten()
    colors = colormaps["viridis"]
    for index, (name, rows) in enumerate(history.items()):
        color = colors(0.9 * index / max(1, len(history) - 1))
        steps = [row[0] for row in rows]
        for column, axes in enumerate(panels, start=1):
            factor = 1 if column == 3 else 100
            axes.plot(steps, [factor * row[column] for row in rows], color=color, linewidth=1.2, label=name)
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    for axes in panels[2:]:
        axes.set_xlabel("optimizer step")
    if len(history) <= 10:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    else:
        last = len(history) - 1
        bar = figure.colorbar(ScalarMappable(Normalize(0, last / 0.9), colors), ax=list(panels))
        bar.ax.set_ylim(0, last)
        bar.set_label("weight, in the order of the model")
    figure.savefig(path, dpi=130)
