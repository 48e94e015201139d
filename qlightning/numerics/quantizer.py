"""The quantizer: the one definition of the arithmetic, in training and in deployment.

    view in blocks -> scale -> format grid -> gradient rule -> view back

`forward(x)` equals `dequantize(quantize(x))` bit for bit (zeros may differ in sign), in every dtype, because both are
`_snap` followed by `_place`, and the scale is already rounded to the dtype in which it ships. Scales, zero points and
the division are float32 whatever the dtype of x; the result is cast once.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlightning.numerics import in_one_pass
from qlightning.numerics.autograd import Ship
from qlightning.numerics.formats import Format
from qlightning.numerics.gradients import STE, Gradient
from qlightning.numerics.granularity import Granularity, PerTensor, Shape
from qlightning.numerics.kernels.switch import casts_float8
from qlightning.numerics.learned import Static
from qlightning.numerics.rounding import Nearest, Rounding, processes
from qlightning.numerics.scales import AbsMax, Grid, MinMax, Scale
from qlightning.numerics.tensor_quantizer import Gradients, State, TensorQuantizer, recomputing
from qlightning.numerics.tensor_quantizer import read_extra_state as read_extra_state
from qlightning.numerics.transform import Basis


class Quantized(NamedTuple):
    """What is stored of a quantized tensor.

    Attributes:
        codes: Integers of the tensor's shape (the format's `code_dtype`).
        scale: Block scales in the dtype they ship in, in the granularity's shape (..., 1).
        zero_point: Integers (the codes' dtype) of the scale's shape, float32 where the scale's zero is real, or None.
        tensor_scale: float32 of one element that divides the scales (NVFP4), or None.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    tensor_scale: Tensor | None = None


class Quantizer(TensorQuantizer):
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
        transform: The basis in which it quantizes: `x -> inverse(quantize(transform(x)))`.

    Attributes:
        stages: What it may become later in training (see `become`); a checkpoint may hold any of them.
    """

    stages: Sequence["Quantizer"] = ()

    def __init__(
        self,
        format: Format,
        granularity: Granularity | None = None,
        *,
        scale: Scale | None = None,
        gradient: Gradient | None = None,
        rounding: Rounding | None = None,
        scale_dtype: torch.dtype | None = None,
        transform: Basis | None = None,
    ) -> None:
        super().__init__()
        self.format = format
        self.granularity = granularity if granularity is not None else PerTensor()
        self.scale = scale if scale is not None else AbsMax() if format.symmetric else MinMax()
        self.gradient = gradient if gradient is not None else STE()
        self.rounding = rounding if rounding is not None else Nearest()
        self.scale_dtype = scale_dtype
        self.transform = transform
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
            "transform": None,
        }
        changed = {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        return {"format": self.format, **changed}

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

    def observe(self, x: Tensor) -> None:
        if isinstance(self.scale, Static) and x.numel() and not recomputing():
            self.scale.observe(self._blocks(x), self.format)

    def become(self, other: "Quantizer") -> None:
        """Go on as `other`: its format, scale rule, gradient and scale dtype. A static scale has to be settled anew.

        Raises:
            ValueError: That would need state which this quantizer does not have.
        """
        if reason := self._cannot_become(other):
            raise ValueError(f"{self!r} cannot become {other!r} in mid-training: {reason}")
        self.format, self.gradient, self.scale_dtype = other.format, other.gradient, other.scale_dtype
        if isinstance(self.scale, Static):
            assert isinstance(other.scale, Static)
            self.scale.follow_rule_of(other.scale, self.format)
        else:
            self.scale = copy.deepcopy(other.scale)

    def _cannot_become(self, other: "Quantizer") -> str | None:
        if self.granularity != other.granularity or self.transform != other.transform:
            return "granularity and transform stay what they are"
        if type(self.rounding) is not type(other.rounding):
            return "the rounding stays what it is"
        if self.scale.static != other.scale.static or (self.scale.static and type(self.scale) is not type(other.scale)):
            return "a dynamic scale stays dynamic, an observed or learned one stays so"
        if self.scale.static and self.format.symmetric != other.format.symmetric:
            return "a static scale keeps its zero point or stays without one"
        return None

    @property
    def later(self) -> Sequence["Quantizer"]:
        return self.stages

    def enter_stage_of(self, other: TensorQuantizer) -> bool:
        for stage in self.stages:
            if stage.deploys_like(other):
                self.become(stage)
                return True
        return False

    # --- arithmetic ---

    def grid(self, x: Tensor) -> Grid:
        """The realised grid for `x`, differentiable with respect to learned scales."""
        if not self.ready:
            raise ValueError(
                f"{self!r} has no scale yet: fit with QATCallback, which calibrates it, or call initialize(x) first"
            )
        dtype = self.ship_dtype(x)
        return self.scale(self._blocks(x), self.format, lambda scale: Ship.apply(scale, dtype))  # type: ignore[no-any-return]

    def ship_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which scales of `x` ship."""
        if self.scale_dtype is not None:
            return self.scale_dtype
        return x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.float32

    def on_grid(self, x: Tensor, state: State, key: Tensor | None) -> Tensor:
        grid = Grid(*state)
        if (made := in_one_pass.values_and_codes(self, x, grid, values=True, codes=False)) and made[0] is not None:
            return made[0]
        return self._place(self._snap(x, grid, key), grid, x.shape).to(x.dtype)

    def steps(self, state: State) -> Tensor:
        return Grid(*state).step

    def codes(self, x: Tensor, state: State, key: Tensor | None) -> Tensor:
        """Codes of `x` on a given grid."""
        made = in_one_pass.values_and_codes(self, x, Grid(*state), values=False, codes=True)
        if made is not None and made[1] is not None:
            return made[1]
        return self.granularity.unview(self.format.encode(self._snap(x, Grid(*state), key)), x.shape)

    def values_and_codes(self, x: Tensor, state: State, key: Tensor | None) -> tuple[Tensor, Tensor]:
        """`values` and `codes` for the price of one. Only the values show where `x` was NaN."""
        grid = Grid(*state)
        made = in_one_pass.values_and_codes(self, x, grid, values=True, codes=True)
        if made is not None and made[0] is not None and made[1] is not None:
            return made[0], made[1]
        q = self._snap(x, grid, key)
        codes = self.granularity.unview(self.format.encode(q), x.shape)
        return self._place(q, grid, x.shape).to(x.dtype), codes

    def decode(self, codes: Tensor, state: State) -> Tensor:
        """float32 values of codes on a given grid."""
        return self._place(self.format.decode(self.granularity.view(codes)), Grid(*state), codes.shape)

    def _blocks(self, x: Tensor) -> Tensor:
        return self.granularity.view(x if self.transform is None else self.transform(x.float()))

    def _positions(self, x: Tensor, grid: Grid) -> Tensor:
        v = self._blocks(x).float() / grid.divisor
        return v if grid.zero_point is None else v.add_(grid.zero_point)

    def _snap(self, x: Tensor, grid: Grid, key: Tensor | None) -> Tensor:
        if (cast := self.cast(x, grid)) is not None:
            return cast.float()
        return self.format.snap(self._positions(x, grid), lambda position: self.rounding.round(position, key))

    def cast(self, x: Tensor, grid: Grid) -> Tensor | None:
        """Values on the unit grid in torch's own 8-bit float, where the device rounds to it as this quantizer does."""
        dtype = self.format.cast_dtype
        if dtype is None or not isinstance(self.rounding, Nearest) or not casts_float8(x):
            return None
        return self._positions(x, grid).clamp_(self.format.low, self.format.high).to(dtype)

    def _place(self, q: Tensor, grid: Grid, shape: Shape) -> Tensor:
        """Values of `q`, which is overwritten: memory that is new for every step costs more than the arithmetic."""
        if grid.zero_point is not None:
            q = q.sub_(grid.zero_point)
        placed = self.granularity.unview(q.mul_(grid.step), shape)
        return placed if self.transform is None else self.transform.inverse(placed)

    def grid_gradients(
        self, grad: Tensor, x: Tensor | None, state: State, key: Tensor | None, wanted: Sequence[bool]
    ) -> Gradients:
        none = (None,) * len(state)
        grid, (scale, zero, *_) = Grid(*state), wanted
        if self.gradient.identity and not scale and not zero and not (self.scale.learned and grid.inner is not None):
            return grad, *none
        assert x is not None
        if fast := in_one_pass.lsq_gradients(self, grad, x, grid, self._damping(x)):
            return fast[0], fast[1] if scale else None, fast[2] if zero else None, None, None
        v = self._positions(x, grid)
        q = self.format.snap(v.clone(), lambda position: self.rounding.round(position, key))
        slope = self.gradient.slope(v, q, self.format)
        if self.gradient.limit is not None:
            slope = slope * (self._blocks(x).abs() < self.gradient.limit)
        blocks = self._blocks(grad).float()
        passed = blocks * slope if grid.inner is None else blocks * slope * (grid.step / grid.inner)
        grad_x = self.granularity.unview(passed, grad.shape)
        if self.transform is not None:
            grad_x = self.transform.inverse(grad_x)
        grad_scale = grad_zero = None
        if scale:
            offset = 0.0 if grid.zero_point is None else grid.zero_point
            moves = slope if grid.inner is None else slope.new_zeros(())  # rounding in another step does not see it
            grad_scale = self.gradient.scale_gradient(blocks, v - offset, q - offset, moves, self.format)
            grad_scale = grad_scale * self._share_of_damping(blocks.shape[-1])
        if zero:
            grad_zero = (blocks * (slope - 1)).sum(-1, keepdim=True) * grid.step * self._damping(x)
        return grad_x.to(grad.dtype), grad_scale, grad_zero, None, None

    def _damping(self, x: Tensor) -> float:
        """What the gradients of a scale and zero point of `x` are multiplied by."""
        elements = self.granularity.view(x).shape[-1]
        return self.gradient.scale_factor(elements, self.format) * self._share_of_damping(elements)

    def _share_of_damping(self, elements: int) -> float:
        """What several processes have of one scale's values are parts of one tensor: it is damped by all of them."""
        count = processes() if self.local and isinstance(self.granularity, PerTensor) else 1
        if count == 1:
            return 1.0
        factor = self.gradient.scale_factor
        return factor(elements * count, self.format) / factor(elements, self.format)

    @property
    def needs_input(self) -> bool:
        """Whether `gradients` needs x itself and not only the codes."""
        return not self.gradient.identity or self.scale.learned or self._ramp() is not None

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
            return Quantized(x.to(self.format.code_dtype), torch.empty(0, dtype=self.ship_dtype(x), device=x.device))
        grid = self.grid(x)
        if not bool(torch.isfinite(grid.step).all()):
            raise ValueError(
                f"a scale of {self!r} overflows {self.scale.ships_as or self.ship_dtype(x)} (largest value "
                f"{float(x.abs().max()):.3g}): write scale_dtype=torch.float32, or 'sfp32' in a spec"
            )
        return self.stored(x, grid, self.rounding.key())

    def stored(self, x: Tensor, grid: Grid, key: Tensor | None = None) -> Quantized:
        """What `quantize` returns for finite values, on a given grid."""
        zero = grid.zero_point
        if zero is not None and not self.scale.real_zero:
            zero = zero.to(self.format.code_dtype)
        scale = grid.scale.to(self.scale.ships_as or self.ship_dtype(x))
        return Quantized(self.codes(x, grid, key), scale, zero, grid.tensor_scale)

    def dequantize(self, quantized: Quantized, dtype: torch.dtype) -> Tensor:
        """Values of stored codes in `dtype`, bit for bit those of `forward` for a tensor of that dtype."""
        codes, scale, zero, tensor_scale = quantized
        if codes.numel() == 0:
            return codes.to(dtype)
        grid = Grid(scale.float(), None if zero is None else zero.float(), tensor_scale)
        return self.decode(codes, grid).to(dtype)

    def deploys_like(self, other: TensorQuantizer) -> bool:
        names = ("format", "granularity", "scale", "scale_dtype", "transform")
        alike = isinstance(other, Quantizer) and all(getattr(self, name) == getattr(other, name) for name in names)
        return alike and self.rounding.ties == other.rounding.ties

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        scales = torch.Size(self.granularity.scale_shape(shape)).numel()
        zero_bits = 0 if self.format.symmetric else 32 if self.scale.real_zero else self.format.bits
        shipped = self.scale.ships_as or self.scale_dtype or dtype
        return sum(-(-bits // 8) for bits in (torch.Size(shape).numel() * self.format.bits, scales * zero_bits)) + (
            scales * shipped.itemsize
        )
