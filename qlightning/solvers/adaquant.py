"""AdaQuant: layer-wise calibration that learns weights, biases and ranges."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlightning.capture import Call, Site, device_of, fetched
from qlightning.layers.layer import Twin
from qlightning.numerics.formats import Format
from qlightning.numerics.learned import Learned, Static
from qlightning.numerics.scales import Grid
from qlightning.numerics.tensor_quantizer import TensorQuantizer
from qlightning.solvers.block_ap import check_stepped, said
from qlightning.solvers.commit import commit, rounded
from qlightning.solvers.fixed import settle_on
from qlightning.solvers.learning import LearningSolver, learn, standing_in
from qlightning.solvers.share import Share
from qlightning.solvers.solver import BlockTask, SiteSolution, StreamName, main_output
from qlightning.solvers.units import Before, seen_by, unit_of


class AdaQuant(LearningSolver):
    """Hubara et al., ICML 2021, arXiv 2006.10518: layer by layer, weights move freely to keep the layer's float output.

    Each layer learns, with quantized weight and input, to return what it returns in the float model: its weight, its
    bias, the ends of its weight's ranges and, where they are learned, those of its input. Where only the positive part
    of its output reaches the block's (a ReLU follows), only that part is compared. The weight is then rounded in place.

    The target is the float model's output on its own activations, in both modes (from memory; it stops errors from
    adding up). Whether a ReLU follows is found by trying, inside the block: name blocks so that the ReLU is in them,
    `calibrate(..., blocks=[...])`. Batch norms are not folded first; see `batch_norm.py` for that. Weights that came
    closer on held-out batches are kept, perhaps those rounded to nearest. What inputs' ranges have learned stays where
    calibration is all there is; a fit that goes on settles them on what it observes.

    Args:
        steps: Of Adam, for each layer, in whole passes over the data; 0 rounds to nearest.
        weight_lr: Learning rate of weights; this and the next three were tuned for 8 bits.
        bias_lr: Of biases.
        range_lr: Of both ends of the weights' ranges.
        input_lr: Of both ends of inputs' ranges.
        stream: Inputs of the model calibrated so far, "q" (the paper's sequential mode), or of the float model, "fp"
            (its parallel mode: layers do not depend on each other).
        held_out: Share of the batches that nothing is learned from and that tell when to stop.
        patience: Passes without a smaller held-out error after which a layer is done.
        batches: Number of batches of calibration data; the paper has one image of each class, 50 in a batch.
        seed: Of the order of batches and of the forward passes' random numbers.
    """

    def __init__(
        self,
        *,
        steps: int = 1000,
        weight_lr: float = 1e-5,
        bias_lr: float = 1e-3,
        range_lr: float = 1e-3,
        input_lr: float = 1e-1,
        stream: StreamName = "q",
        held_out: float = 0.1,
        patience: int = 20,
        batches: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(targets=(), held_out=held_out, patience=patience, batches=batches, seed=seed)
        rates = (weight_lr, bias_lr, range_lr, input_lr)
        if steps < 0 or min(rates) < 0 or stream not in ("q", "fp"):
            raise ValueError(
                f"AdaQuant(steps={steps}, weight_lr={weight_lr}, bias_lr={bias_lr}, range_lr={range_lr}, "
                f"input_lr={input_lr}, stream={stream!r}): write for example "
                "AdaQuant(steps=1000, weight_lr=1e-5, stream='q')"
            )
        self.steps, self.weight_lr, self.bias_lr, self.range_lr = steps, weight_lr, bias_lr, range_lr
        self.input_lr, self.stream = input_lr, stream

    def solve(self, task: BlockTask, *, generator: torch.Generator) -> Mapping[str, str]:
        sites, notes = [site for group in task.groups for site in group], dict[str, str]()
        for site in sites:
            check_stepped("AdaQuant", site)
        before = Before(task.block)
        for site in sites:
            name = unit_of(task.block, site)
            with before():
                inputs, targets, positive = _in_float(task, name)
            if self.stream == "q":
                inputs = [call for call, _ in seen_by(task.block, name, task.inputs["q"])]
            notes[site.name] = self._solve_layer(
                task.block.get_submodule(name), site, inputs, targets, positive, generator, task.share
            )
        return notes

    def _solve_layer(
        self,
        unit: nn.Module,
        site: Site,
        inputs: Sequence[Call],
        targets: Sequence[Tensor],
        positive: bool,
        generator: torch.Generator,
        share: Share,
    ) -> str:
        device, quantizer = device_of(unit), site.quantizer
        ranges = learned_on(quantizer.grid(site.weight), quantizer.format)

        def run(i: int) -> Tensor:
            args, kwargs = fetched(inputs[i], device)
            return main_output(unit(*args, **kwargs))

        def loss(i: int) -> Tensor:
            output = run(i).float()
            return F.mse_loss(F.relu(output) if positive else output, targets[i].to(device).float())

        epochs = -(-self.steps // max(1, share.count(len(inputs))))
        with input_acting(site.layer, run, len(inputs), share) as found, standing_in(site, ranges):
            rates = [(self.weight_lr, [getattr(site.layer, site.prefix)])]
            bias = site.layer._parameters.get("bias")
            rates += [] if bias is None else [(self.bias_lr, [bias])]
            rates += _range_rates(self.range_lr, ranges, quantizer.format)
            for other in found:
                rates += (
                    _range_rates(self.input_lr, other.scale, other.format) if isinstance(other.scale, Learned) else []
                )
            error = learn(
                rates,
                loss,
                batches=len(inputs),
                epochs=epochs,
                held_out=self.held_out,
                patience=self.patience,
                generator=generator,
                share=share,
            )
            values = rounded(quantizer, site.weight).float()
        commit(site, SiteSolution(values), "values")
        return "; ".join(filter(None, [said(error), "its positive output counts" if positive else ""]))


def _in_float(task: BlockTask, name: str) -> tuple[list[Call], list[Tensor], bool]:
    """What a module of the float block gets and shall return, and whether only the positive part of it counts."""
    seen = seen_by(task.block, name, task.inputs["fp"])
    positive = task.share.decide(lambda: only_positive(task.block, name, task.inputs["fp"][:1]))
    return [call for call, _ in seen], [F.relu(output) if positive else output for _, output in seen], positive


def _range_rates(lr: float, scale: Learned, format: Format) -> list[tuple[float, list[Tensor]]]:
    """Both ends of a range move at one rate: of a step, as many make up the range, at so much less."""
    ends: list[Tensor] = [] if scale.lower is None else [scale.lower]
    return [(lr / (format.high - format.low), [scale.value]), (lr, ends)]


def learned_on(grid: Grid, format: Format) -> Learned:
    """A learned scale that begins at a grid."""
    scale = Learned()
    scale.build(grid.scale.shape, format)
    scale.to(grid.scale.device)
    settle_on(scale, grid, format)
    return scale


def only_positive(block: nn.Module, name: str, calls: Sequence[Call]) -> bool:
    """Whether the block's output stays, bit for bit, if what a module in it returns is cut off below zero."""
    ((_, before),) = seen_by(block, "", calls)
    hook = block.get_submodule(name).register_forward_hook(lambda module, args, output: F.relu(output))
    try:
        ((_, after),) = seen_by(block, "", calls)
    finally:
        hook.remove()
    return torch.equal(before, after)


@contextmanager
def input_acting(layer: Twin, run: Any, batches: int, share: Share) -> Iterator[list[TensorQuantizer]]:
    """A layer's input is quantized; static ranges that have not been settled yet are, on what it gets in `run`."""
    found = [quantizer for prefix, quantizer in layer.quantizers() if prefix in layer.placements.get("input", ())]
    waiting = [quantizer for quantizer in found if not quantizer.ready]
    for quantizer in waiting:
        quantizer.observing = True
    with torch.no_grad():
        for i in range(batches if waiting else 0):
            run(i)
    for quantizer in waiting:
        quantizer.observing = False
        assert isinstance(quantizer.scale, Static)
        if not share.alone:
            quantizer.scale.merge(share.sum)
        quantizer.scale.settle()
    for quantizer in found:
        quantizer.enabled = True
    try:
        yield found
    finally:
        for quantizer in found:
            quantizer.enabled = False
