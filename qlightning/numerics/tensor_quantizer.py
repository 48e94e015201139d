"""What sits at a placement: the life cycle of a quantizer and its contract with the layers.

A layer asks for a state (`prepare`), for values on it (`values`) and in backward for gradients (`gradients`). The state
is a tuple of tensors, so that a layer can save it, recompute it and pass it through autograd without knowing what it
means. `Quantizer` is format x granularity x scale x gradient; a composite (a sum of quantizers, a quantizer that leaves
outliers alone) is another subclass, which answers for its first stage where its format, granularity or scale is asked.
"""

import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlightning.numerics.autograd import keep_in_graph
from qlightning.numerics.formats import Format
from qlightning.numerics.forward_quantizer import ForwardQuantizer, State
from qlightning.numerics.gradients import Gradient
from qlightning.numerics.granularity import Shape
from qlightning.numerics.learned import Static
from qlightning.numerics.part import Part
from qlightning.numerics.rounding import Random

Gradients = tuple[Any, ...]
"""The gradient of the quantized tensor, then one for each tensor of the state, or None."""


class TensorQuantizer(Part, ForwardQuantizer):
    """Fake quantization of one tensor.

    Attributes:
        observing: While bypassed, let a static scale gather statistics.
        strength: The lambda of a ramp, a 0-dim tensor, or None at full strength.
        local: Whether each process has other values of what it quantizes, as of an activation; see `see_own_share`.
    """

    observing: bool = False
    local: bool = False
    strength: Tensor | None
    format: Format
    gradient: Gradient

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.register_buffer("strength", None, persistent=False)

    __repr__ = Part.__repr__
    __eq__ = Part.__eq__
    __hash__ = nn.Module.__hash__

    # --- what a subclass says ---

    @abstractmethod
    def build(self, shape: Shape) -> None:
        """Create the state for tensors of that shape, once. A dimension of unknown size is -1.

        Raises:
            ValueError: The shape does not suit the quantizer.
        """

    @abstractmethod
    def grid(self, x: Tensor) -> State:
        """The state for `x`, differentiable with respect to learned scales."""

    @abstractmethod
    def on_grid(self, x: Tensor, state: State, key: Tensor | None) -> Tensor:
        """The deployed values of `x`, of its shape and dtype, outside autograd."""

    @abstractmethod
    def steps(self, state: State) -> Tensor:
        """The step sizes of a state, float32: distances between neighbouring codes, whatever there are several of."""

    @abstractmethod
    def grid_gradients(
        self, grad: Tensor, x: Tensor | None, state: State, key: Tensor | None, wanted: Sequence[bool]
    ) -> Gradients:
        """Gradients at full strength with respect to x and, where `wanted`, to the tensors of the state."""

    @abstractmethod
    def deploys_like(self, other: "TensorQuantizer") -> bool:
        """Whether both put the same values on the same grid; gradient and rounding only matter in training."""

    def trains_like(self, other: "TensorQuantizer") -> bool:
        """Whether both were asked for in the same words; seeds of stochastic rounding differ by layer."""
        alike = self.gradient == other.gradient and type(self.rounding) is type(other.rounding)
        return alike and self.deploys_like(other)

    @abstractmethod
    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        """Bytes of a tensor of that shape and dtype as it ships: packed codes, scales, zero points."""

    # --- life cycle ---

    @property
    def ready(self) -> bool:
        """False while a static scale has not been settled."""
        return not isinstance(self.scale, Static) or self.scale.ready

    def initialize(self, x: Tensor) -> None:
        """Settle a static scale on `x` alone (a weight, say). Nothing to do for a dynamic one."""
        if isinstance(self.scale, Static):
            self.scale.reset()
            self.observe(x)
            self.scale.settle()

    def release(self) -> None:
        """Switch off what acts, for the rest of the run."""
        if self.enabled:
            self.enabled, self.released = False, True

    def take_back(self) -> None:
        """Undo `release`, for a new run."""
        if self.released:
            self.enabled, self.released = True, False

    @abstractmethod
    def observe(self, x: Tensor) -> None:
        """Let a static scale take in `x`, without quantizing it."""

    def see_own_share(self) -> None:
        """Of what it quantizes each process of a run has its own part, not all the same: it is no weight."""
        self.local = True
        for child in self.modules():
            if isinstance(child, TensorQuantizer | Random):
                child.local = True

    def set_strength(self, strength: float) -> None:
        """In training, w + strength * (Q(w) - w) instead of Q(w); evaluation and export always run the deployed grid.

        Args:
            strength: 0 (the identity) to 1 (full quantization, which then costs no more than without a ramp).
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"set_strength({strength}): from 0 to 1")
        if strength == 1:
            self.strength = None
        elif self.strength is None:
            self.strength = torch.tensor(strength, dtype=torch.float32)
        else:
            self.strength.fill_(strength)

    @property
    def full(self) -> bool:
        """Whether values are the grid's own now, not between theirs and the grid's."""
        return self._ramp() is None

    def _ramp(self) -> Tensor | None:
        return self.strength if self.training else None

    # --- arithmetic ---

    def prepare(self, x: Tensor) -> State:
        """The state for one forward call; in training a moving scale takes `x` in first, once per step."""
        if self.training and isinstance(self.scale, Static) and self.scale.moving:
            self.observe(x)
        return self.grid(x)

    def bypass(self, x: Tensor) -> Tensor:
        """x itself, observed if so wished; learned scales stay in the graph with gradient zero."""
        if self.observing:
            self.observe(x)
        return keep_in_graph(x, *self.learned())

    def values(self, x: Tensor, state: State, key: Tensor | None) -> Tensor:
        """Quantized values of `x` on a given state, outside autograd."""
        values, ramp = self.on_grid(x, state, key), self._ramp()
        if ramp is None:
            return values
        return x.float().lerp(values.float(), ramp.to(x.device)).to(x.dtype)

    def values_and_codes(self, x: Tensor, state: State, key: Tensor | None) -> tuple[Tensor, Tensor]:
        """`values` and codes for the price of one, for a quantizer that does not need its input in backward."""
        raise NotImplementedError(f"{type(self).__name__} needs its input in backward")

    def decode(self, codes: Tensor, state: State) -> Tensor:
        """float32 values of such codes."""
        raise NotImplementedError(f"{type(self).__name__} needs its input in backward")

    def gradients(
        self, grad: Tensor, x: Tensor | None, state: State, key: Tensor | None, wanted: Sequence[bool]
    ) -> Gradients:
        """Gradients with respect to x and to the tensors of the state (see `gradients.py` for the formulas).

        Args:
            grad: Gradient of the loss with respect to the quantized values.
            x: What was quantized; may be None unless `needs_input`.
            state: The state it was quantized on.
            key: The key of the forward call.
            wanted: For each tensor of the state, whether its gradient is wanted; the others' are None.
        """
        grad_x, *grads = self.grid_gradients(grad, x, state, key, wanted)
        if (ramp := self._ramp()) is None:
            return grad_x, *grads
        ramp = ramp.to(grad.device)
        return grad.float().lerp(grad_x.float(), ramp).to(grad.dtype), *(g if g is None else g * ramp for g in grads)

    @property
    def needs_input(self) -> bool:
        """Whether `gradients` needs x itself and not only the codes."""
        return True

    @property
    def recomputable(self) -> bool:
        """Whether backward finds the same state again with `grid(x)`, so that it need not be saved."""
        return self.scale.learned or not self.scale.static

    # --- checkpoints ---

    def get_extra_state(self) -> Tensor:
        """What the quantizer is and whether it acts, as JSON bytes: a checkpoint describes itself."""
        from qlightning.numerics.spec import describe

        state = {"quantizer": describe(self), "enabled": self.enabled, "observing": self.observing, "ready": self.ready}
        if self.released:
            state["released"] = True
        if isinstance(self.scale, Static):
            state["moving"] = self.scale.moving
            state |= self.scale.switches()
        # A distributed checkpoint is read into tensors of the size they have at that moment, whatever is on by then.
        text = json.dumps(state).ljust(self._room(state))
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).clone()

    def _room(self, state: dict[str, Any]) -> int:
        """The most that the state can need in any phase of a run."""
        from qlightning.numerics.spec import describe

        longest = max(len(json.dumps(describe(quantizer))) for quantizer in (self, *self.later))
        return longest + len(json.dumps(dict.fromkeys([*state, "released"], False)))

    def set_extra_state(self, state: Tensor) -> None:
        from qlightning.numerics.spec import describe, rebuild

        loaded = read_extra_state(state)
        other = rebuild(loaded["quantizer"])
        if not self.deploys_like(other) and not self.enter_stage_of(other):
            raise ValueError(
                f"the checkpoint holds a quantizer {loaded['quantizer']!r} where the model has {describe(self)!r}: "
                f"convert the model with the checkpoint's own scheme, {loaded['quantizer']!r}"
            )
        self.enabled, self.observing = loaded["enabled"], loaded["observing"]
        self.released = loaded.get("released", False)
        if isinstance(self.scale, Static):
            self.scale.ready, self.scale.moving = loaded["ready"], loaded["moving"]
            self.scale.set_switches(loaded)

    @property
    def later(self) -> Sequence["TensorQuantizer"]:
        """What it may become later in training."""
        return ()

    def enter_stage_of(self, other: "TensorQuantizer") -> bool:
        """Become what `other` is if that is a later stage of this quantizer; False where it is none."""
        return False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint that knows nothing of this quantizer (a float model's) leaves it as it is."""
        if not any(key.startswith(prefix) for key in state_dict):
            for name, value in self.state_dict().items():
                state_dict[prefix + name] = value
        super()._load_from_state_dict(state_dict, prefix, *args)


def recomputing() -> bool:
    """Whether this is a forward pass that activation checkpointing repeats in backward: it must not observe twice."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def read_extra_state(state: Tensor) -> dict[str, Any]:
    """The JSON that `get_extra_state` wrote."""
    read = torch.clone(state)  # as a torch function: FSDPStrategy gives tensors that are read when one asks for them
    loaded: dict[str, Any] = json.loads(bytes(read.cpu().tolist()))
    return loaded
