"""The quantizer: the one definition of the arithmetic, in training and in deployment.

    view in blocks -> scale -> format grid -> gradient rule -> view back

`forward(x)` equals `dequantize(quantize(x))` bit for bit (zeros may differ in sign), in every dtype, because both are
`_snap` followed by `_place`, and the scale is already rounded to the dtype in which it ships. Scales, zero points and
the division are float32 whatever the dtype of x; the result is cast once.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlightning.numerics.autograd import FakeQuantize, Ship, keep_in_graph
from qlightning.numerics.formats import Format
from qlightning.numerics.gradients import STE, Gradient
from qlightning.numerics.granularity import Granularity, PerTensor, Shape
from qlightning.numerics.learned import Static
from qlightning.numerics.part import Part
from qlightning.numerics.rounding import Nearest, Rounding
from qlightning.numerics.scales import AbsMax, Grid, MinMax, Scale


class Quantized(NamedTuple):
    """What is stored of a quantized tensor.

    Attributes:
        codes: Integers of the tensor's shape (the format's `code_dtype`).
        scale: Block scales in the dtype they ship in, in the granularity's shape (..., 1).
        zero_point: Integers (the codes' dtype) of the scale's shape, or None.
        tensor_scale: float32 of one element that divides the scales (NVFP4), or None.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    tensor_scale: Tensor | None = None


class Quantizer(Part, nn.Module):
    """Format x granularity x scale x gradient (x rounding): `x -> scale * (snap(x / scale + zero) - zero)`.

    >>> from qlightning.numerics.formats import Int
    >>> quantizer = Quantizer(Int(4), PerTensor())
    >>> x = torch.tensor([[-7.5, 0.4, 2.6, 7.5]])
    >>> quantizer(x)
    tensor([[-8.,  0.,  3.,  7.]])
    >>> quantizer.quantize(x).codes
    tensor([[-8,  0,  3,  7]], dtype=torch.int8)

    Args:
        format: Which values exist.
        granularity: Which elements share a scale.
        scale: Where the scale comes from; absmax, or min-max for an asymmetric format, when not given.
        gradient: What backward does with the rounding step.
        rounding: Which neighbour is chosen.
        scale_dtype: The dtype in which scales ship and to which they are rounded in training; the dtype of the
            quantized tensor when not given.

    Attributes:
        enabled: False makes it the identity (at no cost); phases switch this.
        observing: While bypassed, let a static scale gather statistics.
    """

    enabled: bool = True
    observing: bool = False

    def __init__(
        self,
        format: Format,
        granularity: Granularity | None = None,
        *,
        scale: Scale | None = None,
        gradient: Gradient | None = None,
        rounding: Rounding | None = None,
        scale_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.format = format
        self.granularity = granularity if granularity is not None else PerTensor()
        self.scale = scale if scale is not None else AbsMax() if format.symmetric else MinMax()
        self.gradient = gradient if gradient is not None else STE()
        self.rounding = rounding if rounding is not None else Nearest()
        self.scale_dtype = scale_dtype
        self._check()

    def _check(self) -> None:
        if not self.scale.static and self.scale.offset not in (None, not self.format.symmetric):
            wanted = "MinMax()" if not self.format.symmetric else "AbsMax()"
            raise ValueError(f"{self.scale!r} does not suit {self.format!r}: write scale={wanted}")
        if self.scale_dtype is not None and self.scale.ships_as not in (None, self.scale_dtype):
            raise ValueError(f"{self.scale!r} ships its scales as {self.scale.ships_as}: leave scale_dtype out")
        if self.scale_dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"scale_dtype={self.scale_dtype}: write torch.float32, torch.bfloat16 or torch.float16")

    def arguments(self) -> dict[str, Any]:
        defaults: dict[str, Any] = {
            "granularity": PerTensor(),
            "scale": AbsMax() if self.format.symmetric else MinMax(),
            "gradient": STE(),
            "rounding": Nearest(),
            "scale_dtype": None,
        }
        changed = {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        return {"format": self.format, **changed}

    __repr__ = Part.__repr__
    __eq__ = Part.__eq__
    __hash__ = nn.Module.__hash__

    # --- life cycle ---

    def build(self, shape: Shape) -> None:
        """Create the state for tensors of that shape, once. A dimension of unknown size is -1.

        Raises:
            ValueError: The granularity does not divide the shape, or a static scale would need an unknown size.
        """
        scale_shape = self.granularity.scale_shape(shape)
        if isinstance(self.scale, Static):
            if any(size < 0 for size in scale_shape):
                raise ValueError(
                    f"{self.scale!r} keeps its scales, but {self.granularity!r} has new ones for every input: "
                    "write a 'tensor' granularity, for example 'int8-tensor-lsq', or a dynamic scale, 'int8-token'"
                )
            self.scale.build(scale_shape, self.format)

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

    def observe(self, x: Tensor) -> None:
        """Let a static scale take in `x`, without quantizing it."""
        if isinstance(self.scale, Static) and x.numel() and not _recomputing():
            self.scale.observe(self.granularity.view(x), self.format)

    def learned(self) -> Iterator[nn.Parameter]:
        """The parameters that gradient descent moves (learned steps and offsets)."""
        return self.scale.parameters(recurse=False)  # recursion hashes modules, which torch.compile cannot trace

    # --- arithmetic ---

    def grid(self, x: Tensor) -> Grid:
        """The realised grid for `x`, differentiable with respect to learned scales."""
        if not self.ready:
            raise ValueError(
                f"{self!r} has no scale yet: fit with QATCallback, which calibrates it, or call initialize(x) first"
            )
        dtype = self._ship_dtype(x)
        return self.scale(self.granularity.view(x), self.format, lambda scale: Ship.apply(scale, dtype))  # type: ignore[no-any-return]

    def _ship_dtype(self, x: Tensor) -> torch.dtype:
        if self.scale_dtype is not None:
            return self.scale_dtype
        return x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.float32

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize: values on the grid, of x's shape and dtype.

        NaN stays NaN. Infinity makes every value that shares its scale non-finite when the scale covers it (absmax,
        min-max, MSE, two-level ...), and saturates like any large value when it does not (static scales, percentiles,
        medians).
        """
        if not self.enabled or x.numel() == 0:
            return self.bypass(x)
        grid = self.prepare(x)
        return FakeQuantize.apply(x, grid.scale, grid.zero_point, grid.tensor_scale, self.rounding.key(), self)

    def prepare(self, x: Tensor) -> Grid:
        """The grid for one forward call; in training a moving scale takes `x` in first, once per step."""
        if self.training and isinstance(self.scale, Static) and self.scale.moving:
            self.observe(x)
        return self.grid(x)

    def bypass(self, x: Tensor) -> Tensor:
        """x itself, observed if so wished; learned scales stay in the graph with gradient zero."""
        if self.observing:
            self.observe(x)
        return keep_in_graph(x, *self.learned())

    def values(self, x: Tensor, grid: Grid, key: Tensor | None) -> Tensor:
        """Quantized values of `x` on a given grid, outside autograd."""
        return self._place(self._snap(x, grid, key), grid, x.shape).to(x.dtype)

    def codes(self, x: Tensor, grid: Grid, key: Tensor | None) -> Tensor:
        """Codes of `x` on a given grid."""
        return self.granularity.unview(self.format.encode(self._snap(x, grid, key)), x.shape)

    def values_and_codes(self, x: Tensor, grid: Grid, key: Tensor | None) -> tuple[Tensor, Tensor]:
        """`values` and `codes` for the price of one. Only the values show where `x` was NaN."""
        q = self._snap(x, grid, key)
        return self._place(q, grid, x.shape).to(x.dtype), self.granularity.unview(self.format.encode(q), x.shape)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """float32 values of codes on a given grid."""
        return self._place(self.format.decode(self.granularity.view(codes)), grid, codes.shape)

    def _positions(self, x: Tensor, grid: Grid) -> Tensor:
        v = self.granularity.view(x).float() / grid.divisor
        return v if grid.zero_point is None else v.add_(grid.zero_point)

    def _snap(self, x: Tensor, grid: Grid, key: Tensor | None) -> Tensor:
        return self.format.snap(self._positions(x, grid), lambda position: self.rounding.round(position, key))

    def _place(self, q: Tensor, grid: Grid, shape: Shape) -> Tensor:
        if grid.zero_point is not None:
            q = q - grid.zero_point
        return self.granularity.unview(q * grid.step, shape)

    def gradients(
        self, grad: Tensor, x: Tensor | None, grid: Grid, key: Tensor | None, *, scale: bool, zero: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients with respect to x, the scale and the zero point (see `gradients.py` for the formulas).

        Args:
            grad: Gradient of the loss with respect to the quantized values.
            x: What was quantized; not needed where the gradient rule is the identity and the scale is not learned.
            grid: The grid it was quantized on.
            key: The key of the forward call.
            scale: Whether the scale's gradient is wanted.
            zero: Whether the zero point's gradient is wanted.
        """
        if self.gradient.identity and not scale and not zero:
            return grad, None, None
        assert x is not None
        v = self._positions(x, grid)
        q = self.format.snap(v.clone(), lambda position: self.rounding.round(position, key))
        slope = self.gradient.slope(v, q, self.format)
        blocks = self.granularity.view(grad).float()
        grad_x = self.granularity.unview(blocks * slope, grad.shape).to(grad.dtype)
        grad_scale = grad_zero = None
        if scale:
            offset = 0.0 if grid.zero_point is None else grid.zero_point
            factor = self.gradient.scale_factor(blocks.shape[-1], self.format)
            grad_scale = (blocks * ((q - offset) - slope * (v - offset))).sum(-1, keepdim=True) * factor
        if zero:
            factor = self.gradient.scale_factor(blocks.shape[-1], self.format)
            grad_zero = (blocks * (slope - 1)).sum(-1, keepdim=True) * grid.step * factor
        return grad_x, grad_scale, grad_zero

    @property
    def needs_input(self) -> bool:
        """Whether `gradients` needs x itself and not only the codes."""
        return not self.gradient.identity or self.scale.learned

    # --- storage ---

    @torch.no_grad()
    def quantize(self, x: Tensor) -> Quantized:
        """Codes, scale and zero point as they are stored.

        Raises:
            ValueError: `x` holds NaN or infinity, which no code can mean, or its scale overflows the dtype it ships in.
        """
        if not bool(torch.isfinite(x).all()):
            raise ValueError(
                f"cannot quantize a tensor with {int((~torch.isfinite(x)).sum())} NaN or infinite values of {x.numel()}"
            )
        if x.numel() == 0:
            return Quantized(x.to(self.format.code_dtype), torch.empty(0, dtype=self._ship_dtype(x), device=x.device))
        grid = self.grid(x)
        if not bool(torch.isfinite(grid.step).all()):
            raise ValueError(
                f"a scale of {self!r} overflows {self.scale.ships_as or self._ship_dtype(x)} (largest value "
                f"{float(x.abs().max()):.3g}): write scale_dtype=torch.float32, or 'sfp32' in a spec"
            )
        codes = self.codes(x, grid, self.rounding.key())
        zero = None if grid.zero_point is None else grid.zero_point.to(self.format.code_dtype)
        stored = self.scale.ships_as or self._ship_dtype(x)
        return Quantized(codes, grid.scale.to(stored), zero, grid.tensor_scale)

    def dequantize(self, quantized: Quantized, dtype: torch.dtype) -> Tensor:
        """Values of stored codes in `dtype`, bit for bit those of `forward` for a tensor of that dtype."""
        codes, scale, zero, tensor_scale = quantized
        if codes.numel() == 0:
            return codes.to(dtype)
        grid = Grid(scale.float(), None if zero is None else zero.float(), tensor_scale)
        return self.decode(codes, grid).to(dtype)

    def get_extra_state(self) -> Tensor:
        """What the quantizer is and whether it acts, as JSON bytes: a checkpoint describes itself."""
        from qlightning.numerics.spec import describe

        state = {"quantizer": describe(self), "enabled": self.enabled, "observing": self.observing, "ready": self.ready}
        if isinstance(self.scale, Static):
            state["moving"] = self.scale.moving
        return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8).clone()

    def set_extra_state(self, state: Tensor) -> None:
        from qlightning.numerics.spec import describe, rebuild

        loaded = read_extra_state(state)
        if not self.deploys_like(rebuild(loaded["quantizer"])):
            raise ValueError(
                f"the checkpoint holds a quantizer {loaded['quantizer']!r} where the model has {describe(self)!r}: "
                f"convert the model with the checkpoint's own scheme, {loaded['quantizer']!r}"
            )
        self.enabled, self.observing = loaded["enabled"], loaded["observing"]
        if isinstance(self.scale, Static):
            self.scale.ready, self.scale.moving = loaded["ready"], loaded["moving"]

    def deploys_like(self, other: "Quantizer") -> bool:
        """Whether both put the same values on the same grid; gradient and rounding only matter in training."""
        return all(
            getattr(self, name) == getattr(other, name) for name in ("format", "granularity", "scale", "scale_dtype")
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint that knows nothing of this quantizer (a float model's) leaves it as it is."""
        if not any(key.startswith(prefix) for key in state_dict):
            for name, value in self.state_dict().items():
                state_dict[prefix + name] = value
        super()._load_from_state_dict(state_dict, prefix, *args)


def _recomputing() -> bool:
    """Whether this is a forward pass that activation checkpointing repeats in backward: it must not observe twice."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def read_extra_state(state: Tensor) -> dict[str, Any]:
    """The JSON that `Quantizer.get_extra_state` wrote."""
    loaded: dict[str, Any] = json.loads(bytes(state.cpu().tolist()))
    return loaded
