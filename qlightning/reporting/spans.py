"""The phases of a run as stretches of steps, for what is drawn over steps."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from qlightning.callbacks.phase import Phase, read_phase
from qlightning.callbacks.phases import places
from qlightning.callbacks.timeline import Timeline


class Span(NamedTuple):
    """A stretch of a run.

    Attributes:
        begin: Its first step.
        end: The step behind its last one.
        label: What holds in it.
        kind: "float", "quantized", "frozen", or "calibration", which lies over one of the others: in it static scales
            of inputs observe.
    """

    begin: int
    end: int
    label: str
    kind: str


def spans_of(state: Mapping[str, Any] | None, module: nn.Module, *, end: int) -> list[Span]:
    """The phases of the run so far, from what a checkpoint holds of its QATCallback; empty where it holds nothing.

    Args:
        state: The callback's state, or None.
        module: The converted module, which says whether anything observes before it acts.
        end: The step at which the checkpoint was written.
    """
    if state is None or "phases" not in state:
        return []
    timeline = timeline_of(state, end=end)
    cuts = [(0, "float", "float")]
    for entry in timeline.entries:
        if (label := said(entry.phase)) is not None:
            cuts.append((entry.at, label, "frozen" if entry.phase.train == "weights" else "quantized"))
    ends = [begin for begin, _, _ in cuts[1:]] + [end]
    spans = [Span(begin, min(until, end), *rest) for (begin, *rest), until in zip(cuts, ends, strict=True)]
    if any(place.observes for place in places(module)):
        begin, acts = _observation(timeline, state["calibration"])
        spans.append(Span(begin, min(acts, end), "calibration", "calibration"))
    return [span for span in spans if span.begin < span.end]


def timeline_of(state: Mapping[str, Any], *, end: int) -> Timeline:
    """The timeline that `Timeline.plain` was asked of."""
    phases = [read_phase(phase) for phase in state["phases"]]
    return Timeline(phases, at=state["at"], ramp=state["ramp"], end=lambda: float(end))


def _observation(timeline: Timeline, calibration: int) -> tuple[int, int]:
    """When static scales of inputs begin to observe, and when they act; as in `callbacks/phases.py`."""
    placements = [p for p in ("input", "output", "kv_cache", "attention") if timeline.begins(p) is not None]
    if not placements:
        return 0, 0
    begins = min(timeline.begins(p) or 0 for p in placements)
    own = [at for p in placements if (at := timeline.observed_from(p)) is not None]
    if own:
        return min(own), begins
    acts = max(begins, calibration)
    return acts - calibration, acts


def said(phase: Phase) -> str | None:
    """A phase in a few words; None for one that only observes."""
    plain = phase.plain()
    words = []
    if "quantize" in plain:
        words.append("quantized" if plain["quantize"] == "all" else f"{' and '.join(plain['quantize'])} quantized")
    if "rules" in plain:
        words.append("other formats")
    if "train" in plain:
        words.append({"weights": "scales frozen", "scales": "only scales train", "all": "all train"}[plain["train"]])
    if not words and "lr" in plain:
        words.append("other learning rate")
    return ", ".join(words) or None
