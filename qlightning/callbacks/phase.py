"""One phase of a run as the user writes it, in Python or in YAML."""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from jsonargparse.typing import register_type

from qlightning.layers.rules import EVERYTHING, Rules
from qlightning.layers.scheme import Scheme
from qlightning.numerics.spec import describe, rebuild
from qlightning.numerics.tensor_quantizer import TensorQuantizer
from qlightning.schedules.learning_rate import Schedule
from qlightning.schedules.steps import to_steps

PLACEMENTS = ("weight", "input", "output", "kv_cache", "attention")
Trains = Literal["all", "weights", "scales"]
Rate = float | Schedule


class Phase:
    """What changes at one step of a run. What a phase does not say stays as it was in the phase before.

    Five phases, for `QATCallback(schedule=[...])` in YAML (and as keyword arguments in Python)::

        schedule:
          - {at: 0, observe: [input], lr: 0.5}     # calibrate: static scales of inputs see the data
          - {at: 0.1, quantize: [weight], lr: 1.0} # weights
          - {at: 0.3, quantize: [input], ramp: 50} # activations, with a strength that grows over 50 steps
          - {at: 0.6, train: scales, lr: 0.3}      # learn scales, at a lower rate
          - {at: 0.9, train: weights}              # freeze them

    Args:
        at: Where it begins: an optimizer step (int) or a share of the run (float).
        quantize: Placements that are quantized from here on ("weight", "input", "output" ...), or "all". Static scales
            are settled at this step, the weights' from the weights as they are then.
        observe: Placements whose static scales observe from here until they act; what was observed before another
            placement began to act or changed its format is forgotten then. Without it they observe the last
            `calibration` steps before they act.
        train: What gradient descent moves from here on: "all" (as at the start), "weights" (everything but learned
            and observed scales) or "scales" (learned scales alone).
        lr: What every learning rate is multiplied by: a factor, or a Schedule over the time until a later phase names
            another. It acts inside the optimizer's step, on top of whatever the run's own scheduler says; schedulers,
            loggers and checkpoints never see it.
        scale_lr: The same for the learning rates of learned scales; that of `lr` until a phase names one.
        ramp: Steps (or share of the run) over which the strength lambda of what begins to act here grows from 0 to 1:
            training sees w + lambda * (Q(w) - w), evaluation always Q(w). Lambda is a straight line from 0 at the last
            step before to 1 at step `at + ramp` (S18, arXiv 2502.11895).
        rules: New specs by layer, as in `QATCallback(rules=...)`: bit annealing. They are laid over the rules before;
            in a layer that one of these decides, the placements it names change their format. Granularity, transform
            and rounding stay, and so does whether a scale is dynamic, observed or learned.
        optimizer: Whether optimizers "keep" or "reset" what they remember of all parameters (moments, step counts).

    Raises:
        ValueError: An argument cannot be meant.
    """

    def __init__(
        self,
        at: int | float = 0,
        *,
        quantize: str | Sequence[str] = (),
        observe: str | Sequence[str] = (),
        train: Trains | None = None,
        lr: Rate | None = None,
        scale_lr: Rate | None = None,
        ramp: int | float = 0,
        rules: Mapping[str, Any] | None = None,
        optimizer: Literal["keep", "reset"] = "keep",
    ) -> None:
        self.at = check_time("at", at)
        self.quantize = _placements("quantize", quantize)
        self.observe = _placements("observe", observe)
        if train not in (None, *get_args(Trains)):
            raise ValueError(f"train={train!r}: write train='all', 'weights' or 'scales'")
        if optimizer not in ("keep", "reset"):
            raise ValueError(f"optimizer={optimizer!r}: write optimizer='keep' or 'reset'")
        self.train: Trains | None = train
        self.lr, self.scale_lr = _rate("lr", lr), _rate("scale_lr", scale_lr)
        self.ramp = check_time("ramp", ramp)
        if ramp and not self.quantize:
            raise ValueError(f"ramp={ramp}: nothing begins to act in this phase; add for example quantize='all'")
        self.rules = dict(rules or {})
        self._check_rules()
        self.optimizer = optimizer

    def _check_rules(self) -> None:
        for pattern, value in self.rules.items():
            if value is None:
                raise ValueError(
                    f"rules={{{pattern!r}: None}}: a layer cannot go back to float in mid-run; write a spec, for "
                    f"example rules={{{pattern!r}: 'int4-g32'}}"
                )
        if self.rules:
            Rules(self.rules)

    def plain(self) -> dict[str, Any]:
        """The phase as YAML would write it, without what is at its default."""
        defaults = {name: p.default for name, p in inspect.signature(Phase).parameters.items()}
        changed = {
            name: value for name, value in vars(self).items() if name == "at" or value not in (defaults[name], {})
        }
        return {name: _plain(value) for name, value in changed.items()}

    def __repr__(self) -> str:
        return f"Phase({', '.join(f'{name}={value!r}' for name, value in self.plain().items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Phase) and self.plain() == other.plain()

    __hash__ = None  # type: ignore[assignment]  # compared by value


def phases_of(
    schedule: Sequence[Phase] | None,
    *,
    start: int | float,
    freeze_scales: int | float | None,
    ramp: int | float,
    anneal: Mapping[int | float, Any] | None,
) -> list[tuple[str, Phase]]:
    """The phases that the arguments of a QATCallback stand for, each with the name of the one that says its time.

    Raises:
        ValueError: Both a schedule and shorthands are given, or a schedule that never quantizes anything.
    """
    short = [("start", Phase(check_time("start", start), quantize="all", ramp=check_time("ramp", ramp)))]
    if len({type(at) for at in anneal or {}}) > 1:
        raise ValueError(f"anneal={dict(anneal or {})!r}: times all in steps (int) or all in shares of the run (float)")
    for at in sorted(anneal or {}):
        short.append(("anneal", Phase(check_time("anneal", at), rules={EVERYTHING: (anneal or {})[at]})))
    if freeze_scales is not None:
        short.append(("freeze_scales", Phase(check_time("freeze_scales", freeze_scales), train="weights")))
    if schedule is None:
        return short
    if start or ramp or len(short) > 1:
        also = ", ".join(repr(phase) for _, phase in short)
        raise ValueError(
            "schedule= says everything that start, ramp, anneal and freeze_scales are shorthands for: leave them out, "
            f"and write what they said as phases, QATCallback(..., schedule=[{also}])"
        )
    if not any(phase.quantize for phase in schedule):
        raise ValueError("no phase of the schedule quantizes anything; add for example Phase(0.5, quantize='all')")
    for placement in {placement for phase in schedule for placement in phase.observe}:
        first = [[placement in getattr(phase, what) for phase in schedule] for what in ("observe", "quantize")]
        if True in first[1] and first[0].index(True) >= first[1].index(True):
            raise ValueError(
                f"{placement!r} must observe before it acts; write for example schedule=[Phase(0, "
                f"observe={placement!r}), Phase(0.1, quantize={placement!r})]"
            )
    return [("at", phase) for phase in schedule]


def check_time(name: str, value: int | float) -> int | float:
    """A moment of a run or a length of time, unchanged. Raises ValueError with the argument's name if it is neither."""
    try:
        to_steps(value, 1_000_000)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}={value!r}: {error}") from None
    return value


def _placements(name: str, given: str | Sequence[str]) -> tuple[str, ...]:
    placements = (given,) if isinstance(given, str) else tuple(given)
    if placements == ("all",):
        return PLACEMENTS
    if wrong := [placement for placement in placements if placement not in PLACEMENTS]:
        raise ValueError(f"{name}={wrong}: write 'all' or placements, of {', '.join(PLACEMENTS)}")
    return placements


def _rate(name: str, given: Any) -> Rate | None:
    if given is None or isinstance(given, Schedule):
        return given
    if isinstance(given, Mapping):
        return Schedule.of(given)
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < float("inf"):
        raise ValueError(
            f"{name}={given!r}: a factor of the learning rate that is not negative, for example {name}=0.1"
        )
    return float(given)


def _plain(value: Any) -> Any:
    if isinstance(value, Schedule):
        return value.plain()
    if isinstance(value, TensorQuantizer):
        return describe(value)
    if isinstance(value, Scheme):
        return {placement: describe(quantizer) for placement, quantizer in value.items()}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if value == PLACEMENTS:
        return "all"
    return list(value) if isinstance(value, tuple) else value


# --- how a LightningCLI, also a user's own, reads the callback's arguments from YAML and options, and prints them ---

if TYPE_CHECKING:
    Spec = str | TensorQuantizer
else:  # read while parsing, so that a wrong spec is an error of its option
    Spec = TensorQuantizer


def read_spec(value: Any) -> TensorQuantizer:
    """A quantizer from a spec or its plain form."""
    if isinstance(value, TensorQuantizer):
        return value
    quantizer = rebuild(value)
    if not isinstance(quantizer, TensorQuantizer):
        raise ValueError(f"{value!r} describes no quantizer; write a spec, for example 'int4-g128'")
    return quantizer


def read_phase(value: Any) -> Phase:
    """A phase from its plain form."""
    if isinstance(value, Phase):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r} is no phase; write for example {{at: 0.5, quantize: all}}")
    if unknown := set(value) - set(inspect.signature(Phase).parameters):
        known = ", ".join(inspect.signature(Phase).parameters)
        raise ValueError(f"a phase has no {', '.join(sorted(unknown))}; it has {known}")
    return Phase(**value)


_READ: dict[type, tuple[Any, Any]] = {TensorQuantizer: (describe, read_spec), Phase: (Phase.plain, read_phase)}
for _kind, (_write, _read) in _READ.items():
    register_type(_kind, serializer=_write, deserializer=_read, type_check=isinstance, fail_already_registered=False)
