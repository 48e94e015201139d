"""LoRA of our own, for models without PEFT: A and B beside a frozen weight, inside its quantizer."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlightning.adapters.adapter import Adapter
from qlightning.adapters.fixed_point import FixedPoint
from qlightning.adapters.inside import Inside
from qlightning.adapters.low_rank import update, update_gradients

Base = Literal["float", "fixed", "codes"]
Unit = Literal["weight", "step"]


class LoRA(Adapter):
    """weight + alpha / rank * B A, of which the weight is frozen (Hu et al. 2021, arXiv 2106.09685).

    A starts random, B at zero. Both stay float32 whatever the model's dtype; the sum is rounded to that dtype once, as
    `restore` writes it into the weight: what trained is what is deployed, bit for bit. A convolution is adapted as the
    matrix (output channels, fan-in).

    Args:
        rank: Rows of A, columns of B.
        alpha: The update counts alpha / rank times.
        base: As what the frozen weight is kept. "float": as it is. "fixed": one byte each, as fixed-point numbers in
            units of the step that its quantizer has when the model is converted; at b bits, 8 - b of them are fraction.
            "codes": as the codes of that quantizer. The Parameter keeps its name and is int8 then; the float weight is
            gone, and `restore` gives it back as far as it was kept.
        unit: The update is added to the weight in its own unit, or in units of that step.
        init: How A starts: "kaiming" (uniform, as PEFT's) or "gaussian" (deviation 1 / rank).
    """

    a: nn.Parameter
    b: nn.Parameter
    like: Tensor
    fixed_point: FixedPoint | None

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 8.0,
        *,
        base: Base = "float",
        unit: Unit = "weight",
        init: Literal["kaiming", "gaussian"] = "kaiming",
    ) -> None:
        super().__init__()
        if rank < 1 or not math.isfinite(alpha):
            raise ValueError(f"LoRA(rank={rank}, alpha={alpha}): at least rank 1, for example LoRA(8, alpha=8.0)")
        if base not in ("float", "fixed", "codes") or unit not in ("weight", "step"):
            raise ValueError(
                f"LoRA(base={base!r}, unit={unit!r}): write base='float', 'fixed' or 'codes', unit='weight' or 'step'"
            )
        if init not in ("kaiming", "gaussian"):
            raise ValueError(f"LoRA(init={init!r}): write init='kaiming' or init='gaussian'")
        self.rank, self.alpha = rank, float(alpha)
        self.base, self.unit, self.init = base, unit, init
        self.register_module("fixed_point", None)

    def under(self, wrapper: nn.Module | None, *, peft: bool) -> Adapter | None:
        if wrapper is not None:
            raise ValueError(
                f"PEFT adapts it already ({type(wrapper).__name__}), and a weight takes one kind of adapter: write "
                "Scheme(weight=..., adapter='peft')"
            )
        return self

    def build(self, matrix: Tensor, features: int) -> None:
        if matrix.is_meta and (self.base, self.unit) != ("float", "weight"):
            raise ValueError(
                f"its weight has no values yet (meta device), from which LoRA(base={self.base!r}, unit={self.unit!r}) "
                "takes its steps: materialise and load the model before it is converted"
            )
        options: dict[str, Any] = {"dtype": torch.float32, "device": matrix.device}
        a = torch.empty(self.rank, matrix.shape[1], **options)
        if self.init == "kaiming":
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        else:
            nn.init.normal_(a, std=1 / self.rank)
        self.a, self.b = nn.Parameter(a), nn.Parameter(torch.zeros(matrix.shape[0], self.rank, **options))
        self.register_buffer("like", matrix.new_empty(0), persistent=False)  # follows the model's dtype

    # --- the frozen weight ---

    def on_attached(self, layer: Any) -> None:
        self._was_trained = layer.weight.requires_grad
        layer.weight.requires_grad_(False)
        if (self.base, self.unit) != ("float", "weight"):
            self.fixed_point = FixedPoint(layer, "codes" if self.base == "codes" else "fixed")

    def on_kept(self, layer: Any) -> None:
        if self.fixed_point is not None:
            self._take_base(layer)

    def _take_base(self, layer: Any) -> None:
        """Fix the step, from the quantizer as it is now, and keep the weight in units of it where that is wished."""
        assert self.fixed_point is not None
        matrix = layer.weights()["weight"].detach()
        self.fixed_point.take_step(layer.quantizer("weight"), matrix)
        if self.base != "float":
            _put(layer, self.fixed_point.encode(matrix))

    def on_loading(self, layer: Any, state_dict: dict[str, Any], prefix: str) -> None:
        key = f"{prefix}weight"
        loaded = state_dict.get(key)
        if self.fixed_point is None or not isinstance(loaded, Tensor) or loaded.shape != layer.weight.shape:
            return
        if any(name.startswith(f"{prefix}adapter.") for name in state_dict):
            if loaded.dtype == torch.int8 and layer.weight.is_floating_point():
                layer.weight.data = torch.empty_like(layer.weight, dtype=torch.int8)
            return
        # A float model's: what conversion did with its own weight is done with this one.
        quantizer = layer.quantizer("weight")
        layer.weight.data = loaded.to(self.like).clone()
        quantizer.initialize(layer.weights()["weight"])
        self._take_base(layer)
        state_dict[key] = layer.weight.data
        state_dict |= {f"{prefix}weight_quantizer.{name}": value for name, value in quantizer.state_dict().items()}

    @torch.no_grad()
    def on_detached(self, layer: Any) -> None:
        """The weight becomes the merged one."""
        rule = self.inside()
        _put(layer, rule.effective(layer.weights()["weight"], rule.tensors()))
        layer.weight.requires_grad_(self._was_trained)

    def kept_bits(self) -> int | None:
        if self.base == "float" or self.fixed_point is None:
            return None
        return self.fixed_point.format.bits if self.base == "codes" else 8

    # --- the rule ---

    def inside(self) -> "Update":
        point = self.fixed_point
        return Update(self.a, self.b, self.alpha / self.rank, self.like.dtype, point, self.unit == "step")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRA":
        """Moves with the model but stays float32 when the model is cast: small updates must not be rounded away."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        like = fn(self.like) if hasattr(self, "like") else None
        super()._apply(move, recurse)
        if like is not None:
            self.like = like
        return self


class Update(Inside):
    """base + scaling * B A (in units of a step, or of the weight), rounded to the model's dtype.

    Args:
        a: (rank, fan-in).
        b: (output channels, rank).
        scaling: Of B A.
        dtype: Of the result.
        fixed_point: What an integer base means, and the step.
        in_steps: Whether B A counts steps.
    """

    def __init__(
        self, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype, fixed_point: FixedPoint | None, in_steps: bool
    ) -> None:
        self._tensors, self.scaling, self.dtype = (a, b), scaling, dtype
        self.fixed_point, self.in_steps = fixed_point, in_steps

    def tensors(self) -> tuple[Tensor, ...]:
        return self._tensors

    def effective(self, matrix: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        a, b = tensors
        with torch.autocast(matrix.device.type, enabled=False):
            base = matrix
            if not matrix.is_floating_point():
                assert self.fixed_point is not None
                base = self.fixed_point.decode(matrix)
            return (base + self._in_weights(update(a, b, self.scaling))).to(self.dtype)

    def gradients(self, grad: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        a, b = tensors
        return update_gradients(self._in_weights(grad), a, b, self.scaling)

    def _in_weights(self, x: Tensor) -> Tensor:
        if not self.in_steps:
            return x
        assert self.fixed_point is not None
        return self.fixed_point.times_step(x)


@torch.no_grad()
def _put(layer: Any, matrix: Tensor) -> None:
    """Give the weight other values, of another dtype; the Parameter stays the object it is."""
    layer.weight.data = torch.empty_like(layer.weight, dtype=matrix.dtype).copy_(layer.laid_out(matrix))
