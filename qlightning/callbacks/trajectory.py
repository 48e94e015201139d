"""TrajectoryCallback: how step sizes and codes moved, for `qlightning report`."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from qlightning.callbacks.order import qat_before
from qlightning.callbacks.phases import Place, places
from qlightning.evaluation.sample import evenly
from qlightning.layers.sharding import whole
from qlightning.numerics.quantizer import Quantizer
from qlightning.optim.weights import Weight, weights_in

NAN = float("nan")


class Sample(NamedTuple):
    """One quantizer at one step.

    Attributes:
        step: The optimizer step, before it is taken.
        low: 5th percentile of its step sizes.
        median: Median of its step sizes.
        high: 95th percentile of its step sizes.
        flips: Share of its codes that the step changed; NaN where an element has no single code.
    """

    step: float
    low: float
    median: float
    high: float
    flips: float


class TrajectoryCallback(Callback):
    """Records the step sizes of all weights and settled inputs, and how many codes change in a step.

    The record is in the checkpoint, where `qlightning report` finds it. It does not grow with the run: whenever it is
    full, every second sample is dropped and twice as many steps lie between those that follow. Sharded weights are
    gathered for it, layer by layer. Stands after the QATCallback. What single weights do, and what to do against it, is
    `OscillationCallback`'s.

    Args:
        every: Optimizer steps between two samples, at the start.
        keep: Samples at which the record is full.
        elements: Of a larger weight, so many evenly spaced elements are watched for changes of their codes.

    Attributes:
        samples: By the name of the weight or placement, in the order of time.
        interval: Optimizer steps between two samples now.

    Raises:
        ValueError: From the constructor for what cannot be meant.
    """

    def __init__(self, every: int = 10, *, keep: int = 200, elements: int = 16_384) -> None:
        if every < 1 or keep < 2 or elements < 1:
            raise ValueError(
                f"TrajectoryCallback(every={every}, keep={keep}, elements={elements}): at least 1, 2 and 1, for "
                "example TrajectoryCallback(every=10, keep=200)"
            )
        self.every, self.keep, self.elements = every, keep, elements
        self.samples: dict[str, list[Sample]] = {}
        self.interval = every
        self._last = -1
        self._begun: tuple[int, dict[str, Sample], dict[str, Tensor]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        qat_before(self, trainer)
        if stage == "fit" and trainer.global_step == 0:  # it may have been in another run; a checkpoint is loaded later
            self.samples, self.interval, self._last, self._begun = {}, self.every, -1, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = None

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if self._begun is not None or step == self._last or step % self.interval:
            return  # with accumulated gradients, several batches belong to one step
        samples: dict[str, Sample] = {}
        codes: dict[str, Tensor] = {}
        for weight in whole_weights(trainer, pl_module):
            matrix = weight.matrix()
            state = weight.state(matrix)
            samples[weight.name] = _sample(step, weight.quantizer.steps(state))
            if (found := self._codes(weight, matrix, state)) is not None:
                codes[weight.name] = found
        samples |= {
            place.name: _sample(step, steps) for place, steps in settled_inputs(pl_module, trainer.strategy.model)
        }
        self._begun = (step, samples, codes)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._begun is None or trainer.global_step == self._begun[0]:
            return
        step, samples, codes = self._begun
        self._begun, self._last = None, step
        for weight in whole_weights(trainer, pl_module) if codes else ():
            if (before := codes.get(weight.name)) is None:
                continue
            matrix = weight.matrix()
            now = self._codes(weight, matrix, weight.state(matrix))
            assert now is not None
            flips = float((now != before).float().mean())
            samples[weight.name] = samples[weight.name]._replace(flips=flips)
        for name, sample in samples.items():
            self.samples.setdefault(name, []).append(sample)
        self._thin()

    def _codes(self, weight: Weight, matrix: Tensor, state: Any) -> Tensor | None:
        """Codes of evenly spaced elements, or None where an element has no single one."""
        if not isinstance(weight.quantizer, Quantizer):
            return None
        return evenly(weight.quantizer.codes(matrix, state, None), self.elements).clone()

    def _thin(self) -> None:
        while any(len(samples) >= self.keep for samples in self.samples.values()):
            self.interval *= 2
            self.samples = {
                name: [sample for sample in samples if sample.step % self.interval == 0]
                for name, samples in self.samples.items()
            }

    def state_dict(self) -> dict[str, Any]:
        """Every sample is a row of a tensor: step, low, median, high, flips."""
        rows = {name: torch.tensor(samples, dtype=torch.float64) for name, samples in self.samples.items()}
        return {"samples": rows, "interval": self.interval, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples = read_samples(state_dict)
        self.interval, self._last = state_dict["interval"], state_dict["last"]


def read_samples(state: Mapping[str, Any]) -> dict[str, list[Sample]]:
    """The samples in what a checkpoint holds of a TrajectoryCallback."""
    return {name: [Sample(*row) for row in rows.tolist()] for name, rows in state["samples"].items()}


def whole_weights(trainer: Trainer, pl_module: LightningModule) -> Iterator[Weight]:
    """The weights whose quantizer acts; each is whole, whoever has sharded it, until one asks for the next."""
    for weight in weights_in(pl_module):
        if weight.quantizer.enabled:
            with whole(weight.layer, trainer.strategy.model):
                yield weight


def settled_inputs(module: LightningModule, root: nn.Module | None = None) -> Iterator[tuple[Place, Tensor]]:
    """The acting quantizers of activations whose step sizes are state, with these; `root` is what a strategy runs."""
    for place in places(module):
        scale = place.quantizer.scale
        acts = place.observes and place.quantizer.enabled and place.quantizer.ready
        if acts and isinstance(getattr(scale, "value", None), Tensor):
            with whole(place.quantizer, root):
                value: Any = scale.value
                steps = value.detach().abs()
            yield place, steps


def _sample(step: int, steps: Tensor) -> Sample:
    ranked = evenly(steps.detach().float(), 4096).sort().values
    low, median, high = (float(ranked[round(share * (len(ranked) - 1))]) for share in (0.05, 0.5, 0.95))
    return Sample(float(step), low, median, high, NAN)
