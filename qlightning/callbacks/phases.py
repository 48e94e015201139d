"""Phases: which quantizers act at which step of a run. Switches of values only; the structure never changes.

    step      0 ............ start - calibration ............... start ........... freeze ............
    weights   float          float                               quantized         quantized
    inputs    float          float, static scales observe        quantized         quantized, static scales fixed

When `start` is sooner than `calibration`, static input scales observe the first `calibration` steps and act after them.
A switch settles every static scale it switches on, the weights' from the weights as they are then, the inputs' from
what was just observed: range, scale and switch move together.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qlightning.callbacks.timeline import Timeline
from qlightning.layers.convert import quantizers_of
from qlightning.layers.coverage import public_name
from qlightning.layers.layer import Twin
from qlightning.layers.sharding import whole
from qlightning.numerics.formats import Format
from qlightning.numerics.learned import Static
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.rounding import Random
from qlightning.numerics.scales import AbsMax, Measured, MinMax
from qlightning.numerics.tensor_quantizer import TensorQuantizer


class Place(NamedTuple):
    """One quantizer where it sits."""

    name: str
    layer: Twin
    prefix: str
    quantizer: TensorQuantizer

    @property
    def layer_name(self) -> str:
        return self.name.removesuffix(f".{self.prefix}")

    @property
    def placement(self) -> str:
        """The placement of a Scheme that it stands at."""
        named = (placement for placement, prefixes in self.layer.placements.items() if self.prefix in prefixes)
        return next(named, "weight")

    @property
    def is_weight(self) -> bool:
        return self.prefix in self.layer.weights()

    @property
    def observes(self) -> bool:
        """Whether its scale is settled by what the layer sees in training."""
        return isinstance(self.quantizer.scale, Static) and not self.is_weight


def places(module: nn.Module) -> Iterator[Place]:
    """Every quantizer of a converted module with its layer."""
    for name, layer in module.named_modules():
        if isinstance(layer, Twin):
            for prefix, quantizer in layer.quantizers():
                yield Place(f"{public_name(name)}.{prefix}", layer, prefix, quantizer)


def learned_beside(module: nn.Module) -> dict[nn.Parameter, list[nn.Parameter]]:
    """Every learned scale, with the parameters of the layer that it belongs to."""
    return {
        scale: list(place.layer.parameters(recurse=False))
        for place in places(module)
        for scale in place.quantizer.learned()
    }


class Phases:
    """The phases of one run of a converted module.

    Args:
        module: The converted module.
        timeline: What holds at which step.
        calibration: Steps during which static scales of activations observe, where no phase says otherwise.
        stages: What quantizers become in each phase, by the name of their place.
        step: The last step whose phase the module is in already, -1 at the start of a run.
        reduce: Sums a statistic over processes.
        processes: Their number.
        whole: A context in which the parameters of a layer are whole, whoever has sharded them.

    Raises:
        ValueError: The timeline leaves a quantizer without use, or trains what there is not.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        timeline: Timeline,
        calibration: int,
        stages: Sequence[Mapping[str, Quantizer]],
        step: int,
        reduce: Callable[[Tensor], Tensor],
        processes: int = 1,
        whole: Callable[[nn.Module], AbstractContextManager[None]] = whole,
    ) -> None:
        self._places = list(places(module))
        self._all = [quantizer for _, quantizer in quantizers_of(module)]  # also of parts, which no phase switches
        _check(self._places, timeline)
        self.timeline, self.calibration, self.step = timeline, calibration, step
        self._reduce, self._processes, self._whole = reduce, processes, whole
        self._applied: int | None = None
        self._later: dict[str, list[tuple[int, Quantizer]]] = {}
        for entry in timeline.entries:
            for name, stage in stages[entry.number].items():
                self._later.setdefault(name, []).append((entry.at, stage))
        self._switches = {self._from(place) for place in self._places} | {
            at for later in self._later.values() for at, _ in later
        }

    def begin(self) -> None:
        """The state before the first step of a fresh run (a resumed run has it from its checkpoint)."""
        for quantizer in self._all:
            quantizer.take_back()
        for place in self._places:
            quantizer = place.quantizer
            self._begin_in_first_stage(place)
            quantizer.enabled = self._from(place) <= 0
            quantizer.observing = False
            if isinstance(quantizer.scale, Static) and not quantizer.enabled:
                quantizer.scale.ready = False
                quantizer.scale.reset()

    def _begin_in_first_stage(self, place: Place) -> None:
        """A module that an earlier run has annealed begins this one as the rules say."""
        quantizer = place.quantizer
        if not isinstance(quantizer, Quantizer) or not quantizer.stages or quantizer.deploys_like(quantizer.stages[0]):
            return
        quantizer.become(quantizer.stages[0])
        if place.is_weight:
            self._settle(place)
        elif isinstance(quantizer.scale, Static):
            quantizer.scale.ready = False  # it observes anew
            quantizer.scale.reset()

    def _from(self, place: Place) -> int:
        """The step from which a quantizer acts."""
        begins = self.timeline.begins(place.placement)
        assert begins is not None
        if begins == 0 and place.quantizer.ready:
            return 0
        waits = place.observes and self.timeline.observed_from(place.placement) is None
        return max(begins, self.calibration) if waits else begins

    def _observes_at(self, place: Place, step: int) -> bool:
        """Whether a quantizer that does not act yet observes."""
        since = self.timeline.observed_from(place.placement)
        return place.observes and step >= (self._from(place) - self.calibration if since is None else since)

    def waits_for(self) -> list[Place]:
        """What acts later than the rest, since it must observe first."""
        return [place for place in self._places if self._from(place) > (self.timeline.begins(place.placement) or 0)]

    def acts(self, placement: str) -> bool:
        """Whether anything acts at a placement now."""
        return any(place.quantizer.enabled for place in self._places if place.placement == placement)

    def strengths(self) -> list[bool]:
        """Which quantizers act at less than full strength."""
        return [place.quantizer.strength is not None for place in self._places]

    def apply(self, step: int) -> list[TensorQuantizer]:
        """Bring every quantizer into the phase of an optimizer step.

        Returns:
            Those that were switched on or given another format.

        Raises:
            ValueError: A static scale is to act but has observed nothing, or nothing finite.
        """
        if step == self._applied:
            return []
        switches = any(self.step < at <= step for at in self._switches)
        switched: list[Place] = []
        unobserved: list[Place] = []
        for place in self._places:
            if place.quantizer.released:
                continue
            quantizer, acts = place.quantizer, step >= self._from(place)
            settled = self._enter_stage(place, step)
            if not quantizer.enabled and acts:
                settled = self._settle(place)
                quantizer.enabled, quantizer.observing = settled, False
            elif not quantizer.enabled and place.observes:
                self._observe(place, step, anew=switches)
            if settled is not None:
                (switched if settled else unobserved).append(place)
            quantizer.set_strength(self.timeline.strength(place.placement, step) if quantizer.enabled else 1.0)
            self._move(place, step)
        if unobserved:
            raise ValueError(self._unobserved(unobserved, step))
        self._applied = self.step = step
        return [place.quantizer for place in switched]

    def _unobserved(self, places: Sequence[Place], step: int) -> str:
        return (
            f"{', '.join(place.name for place in places)}: no input was seen in the {self.calibration} calibration "
            f"steps before step {step}; calibrate longer, QATCallback(calibration={max(1, 4 * self.calibration)}), or "
            f"leave them in float, rules={{{places[0].layer_name!r}: None}}"
        )

    def _observe(self, place: Place, step: int, *, anew: bool) -> None:
        """Another placement that begins to act changes what this one will see: what it saw until then is stale."""
        place.quantizer.observing = self._observes_at(place, step)
        if anew and isinstance(place.quantizer.scale, Static):
            place.quantizer.scale.reset()

    def _move(self, place: Place, step: int) -> None:
        """Let scales that follow the data do so while they act and are not frozen; once after a change of format."""
        quantizer, scale = place.quantizer, place.quantizer.scale
        if not isinstance(scale, Static):
            return
        if scale.follows:
            begins_anew = place.name in self._later and not bool(scale.count)
            scale.moving = quantizer.enabled and (begins_anew or self.timeline.trains(step) != "weights")
            return
        stage = self._previewed(place, step) if quantizer.enabled else None
        if stage is not None and not scale.moving:
            scale.reset()
        scale.moving = stage is not None
        if isinstance(scale.rule, InFormat):
            scale.rule = scale.rule.own
        if stage is not None:
            scale.rule = InFormat(stage, own=scale.rule)

    # --- formats that change ---

    def _enter_stage(self, place: Place, step: int) -> bool | None:
        """Take on the format of a step. Returns whether its scale was settled for it, or None where nothing changed.

        What does not act yet takes on at once the format in which it will begin to act.
        """
        quantizer, due = place.quantizer, max(step, self._from(place))
        reached = [stage for at, stage in self._later.get(place.name, ()) if at <= due]
        if not reached or _trains_like(quantizer, reached[-1]):
            return None
        assert isinstance(quantizer, Quantizer)
        stage, scale = reached[-1], quantizer.scale
        if quantizer.deploys_like(stage):  # nothing to settle, also not again in a run that was resumed since
            quantizer.gradient = stage.gradient
            return None
        ahead = quantizer.enabled and place.observes and isinstance(scale, Static) and not scale.follows
        settled = self._settle(place) if ahead else True  # on what was seen of the new format, before it is forgotten
        quantizer.become(stage)  # a moving average begins anew with the next input
        if not quantizer.enabled:
            return None
        return self._settle(place) if place.is_weight else settled

    def _previewed(self, place: Place, step: int) -> Quantizer | None:
        """The format which an acting static scale of activations is about to take on, and observes for."""
        if not place.observes:
            return None
        ahead = [stage for at, stage in self._later.get(place.name, ()) if step < at <= step + self.calibration]
        return ahead[0] if ahead else None

    def rewind(self, step: int) -> None:
        """The module has been given back the state it had in an earlier step; the phase of that step holds."""
        self.step, self._applied = step, None

    def pool(self) -> None:
        """Let scales that follow the data follow the data of every process."""
        scales = [place.quantizer.scale for place in self._places if place.observes]
        following = [scale for scale in scales if isinstance(scale, Static) and scale.moving and scale.follows]
        moving = [tensor for scale in following for tensor in scale.buffers()]
        if self._processes > 1 and moving:
            mean = self._reduce(torch.cat([t.flatten() for t in moving])) / self._processes
            for tensor, pooled in zip(moving, mean.split([t.numel() for t in moving]), strict=True):
                tensor.copy_(pooled.view_as(tensor))

    def _settle(self, place: Place) -> bool:
        scale = place.quantizer.scale
        if not isinstance(scale, Static):
            return True
        with self._whole(place.layer):
            return self._settle_whole(place, scale)

    def _settle_whole(self, place: Place, scale: Static) -> bool:
        if place.is_weight:
            place.quantizer.initialize(place.layer.effective(place.prefix).detach())
        else:
            scale.merge(self._reduce)
            if not bool(scale.count):
                return False
            scale.settle()
        if any(not bool(torch.isfinite(tensor).all()) for tensor in [*scale.parameters(), *scale.buffers()]):
            raise ValueError(
                f"{place.name}: its scale is not finite; its weight or input held NaN or infinity. If training "
                "diverged, take a smaller learning rate or clip gradients, Trainer(gradient_clip_val=1.0)"
            )
        return True


def _check(present: Sequence[Place], timeline: Timeline) -> None:
    if never := sorted({place.placement for place in present if timeline.begins(place.placement) is None}):
        raise ValueError(
            f"no phase of the schedule quantizes {', '.join(never)}, for which there are quantizers: add for example "
            f"Phase(0.5, quantize={never[0]!r}), or leave {never[0]}= out"
        )
    learned = any(True for place in present for _ in place.quantizer.learned())
    if not learned and any(entry.phase.train == "scales" for entry in timeline.entries):
        raise ValueError("train='scales' trains nothing here: no scale is learned; write for example 'int4-g32-lsq'")


class InFormat(Measured):
    """A rule that measures for the format that a quantizer is about to take on.

    Args:
        stage: What the quantizer will be.
        own: Its rule until then.
    """

    def __init__(self, stage: Quantizer, *, own: Measured) -> None:
        super().__init__()
        assert isinstance(stage.scale, Static)
        self.own, self.format = own, stage.format
        self.rule = stage.scale.source or (AbsMax() if stage.format.symmetric else MinMax())

    def measure(self, blocks: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
        return self.rule.measure(blocks, self.format)


def _trains_like(one: TensorQuantizer, other: Quantizer) -> bool:
    return one.deploys_like(other) and one.gradient == other.gradient


def advance_rounding(module: nn.Module) -> None:
    """Move every stochastic rounding to the random numbers of the next training batch."""
    for child in module.modules():
        if isinstance(child, Random):
            child.advance()
