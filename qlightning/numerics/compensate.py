"""Outlier clamping and compensation: quantize the bulk, and let what sticks out of it pass as it is."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from qlightning.numerics.granularity import Shape
from qlightning.numerics.learned import Static
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.spec import parse
from qlightning.numerics.tensor_quantizer import Gradients, State, TensorQuantizer


class ClampCompensate(TensorQuantizer):
    """x -> Q(clamp(x)) + (x - clamp(x)), clamped at two quantiles of x: Q sees no outliers, and none is lost.

    The second term is sparse; what multiplies it costs little. Optimizing Large Language Model Training Using FP4
    Quantization (Wang et al., ICML 2025, arXiv 2501.17116), section 3.2. The quantiles are elements of x: the upper
    one is the ceil(alpha n)-th smallest of n, the lower one the ceil(alpha n)-th largest.

    Args:
        quantizer: Q, or its spec, with a dynamic scale; for example "fp4e2m1-token".
        alpha: The upper quantile, in (0.5, 1]; 1 clamps nothing.
        over: Which values are ranked together: the "tensor", those of one "channel" (last dimension), or one "token".
        residual: "exact" adds x - clamp(x); "none" drops it (clamping alone).

    Raises:
        ValueError: An argument is out of range, or the quantizer's scale is observed or learned.
    """

    def __init__(
        self,
        quantizer: str | Quantizer,
        *,
        alpha: float = 0.99,
        over: Literal["tensor", "channel", "token"] = "tensor",
        residual: Literal["exact", "none"] = "exact",
    ) -> None:
        super().__init__()
        if not 0.5 < alpha <= 1:
            raise ValueError(f"ClampCompensate(alpha={alpha}): above 0.5 and at most 1, for example alpha=0.99")
        if over not in ("tensor", "channel", "token"):
            raise ValueError(f"ClampCompensate(over={over!r}): write 'tensor', 'channel' or 'token'")
        if residual not in ("exact", "none"):
            raise ValueError(f"ClampCompensate(residual={residual!r}): write 'exact' or 'none'")
        self.quantizer = parse(quantizer) if isinstance(quantizer, str) else quantizer
        if isinstance(self.quantizer.scale, Static):
            raise ValueError(
                f"ClampCompensate({self.quantizer!r}): its clamp moves with every input, so its scale must too; write "
                "for example ClampCompensate('fp4e2m1-token')"
            )
        self.alpha, self.over, self.residual = float(alpha), over, residual
        inner = self.quantizer
        self.format, self.granularity, self.gradient = inner.format, inner.granularity, inner.gradient
        # the same objects, not children once more: `quantizer.scale` is their name in the state dict
        self.__dict__["scale"], self.__dict__["rounding"] = inner.scale, inner.rounding

    def build(self, shape: Shape) -> None:
        self.quantizer.build(shape)

    def observe(self, x: Tensor) -> None:
        """Nothing: its scale has no memory."""

    def learned(self) -> Iterator[nn.Parameter]:
        return iter(())

    def grid(self, x: Tensor) -> State:
        lowest, highest = self._bounds(x.detach())
        return (lowest, highest, *self.quantizer.grid(x.detach().clamp(lowest, highest)))

    def _bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two quantiles, of x's dtype, broadcastable to x."""
        if self.over == "tensor":
            ranked, dim = x.reshape(-1), 0
        elif self.over == "channel":
            ranked, dim = x.reshape(-1, x.shape[-1]), 0
        else:
            ranked, dim = x, -1
        count = ranked.shape[dim]
        rank = min(count, max(1, -int(-count * self.alpha // 1)))
        highest = ranked.kthvalue(rank, dim=dim, keepdim=True).values
        lowest = ranked.kthvalue(count + 1 - rank, dim=dim, keepdim=True).values
        return (lowest[0], highest[0]) if self.over == "channel" else (lowest, highest)

    def on_grid(self, x: Tensor, state: State, key: Tensor | None) -> Tensor:
        lowest, highest, *grid = state
        bulk = x.clamp(lowest, highest)
        values = self.quantizer.on_grid(bulk, tuple(grid), key)
        if self.residual == "none":
            return values
        return (values.float() + (x.float() - bulk.float())).to(x.dtype)

    def steps(self, state: State) -> Tensor:
        return self.quantizer.steps(state[2:])

    def grid_gradients(
        self, grad: Tensor, x: Tensor | None, state: State, key: Tensor | None, wanted: Sequence[bool]
    ) -> Gradients:
        """Q's gradient for what lies between the quantiles, 1 outside; the quantiles themselves have none."""
        none = (None,) * len(state)
        if self.gradient.identity:
            return grad, *none
        assert x is not None
        lowest, highest, *grid = state
        bulk = x.clamp(lowest, highest)
        inner, *_ = self.quantizer.grid_gradients(grad, bulk, tuple(grid), key, (False,) * len(grid))
        return torch.where(bulk == x, inner, grad), *none

    @property
    def recomputable(self) -> bool:
        return False  # two selections over the whole tensor; the state is small

    def deploys_like(self, other: TensorQuantizer) -> bool:
        return (
            isinstance(other, ClampCompensate)
            and (self.alpha, self.over, self.residual) == (other.alpha, other.over, other.residual)
            and self.quantizer.deploys_like(other.quantizer)
        )

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        """The quantizer's, and a value with a 32-bit index for each outlier."""
        outliers = 0 if self.residual == "none" else round(2 * (1 - self.alpha) * torch.Size(shape).numel())
        return self.quantizer.stored_bytes(shape, dtype) + outliers * (dtype.itemsize + 4)
