"""The autograd functions of a quantizer. Each saves only what was there before and recomputes the rest in backward."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlightning.numerics.compiled import rounded

if TYPE_CHECKING:
    from qlightning.numerics.forward_quantizer import ForwardQuantizer


class Ship(torch.autograd.Function):
    """Round scales to the dtype they ship in (and to at least its smallest useful value), straight-through."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, dtype: torch.dtype) -> Tensor:
        smallest = 2.0**-24 if dtype == torch.float16 else torch.finfo(torch.float32).smallest_normal
        return rounded(scale, dtype).clamp(min=smallest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class FakeQuantize(torch.autograd.Function):
    """Quantized values in forward; in backward the gradient rule, from x and the state (no intermediate is saved)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, quantizer: "ForwardQuantizer", key: Tensor | None, *state: Tensor | None
    ) -> Tensor:
        ctx.quantizer = quantizer
        ctx.save_for_backward(x if quantizer.needs_input else None, key, *state)
        return quantizer.values(x, state, key)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, key, *state = ctx.saved_tensors
        grad_x, *grads = ctx.quantizer.gradients(grad, x, tuple(state), key, ctx.needs_input_grad[3:])
        return grad_x, None, None, *grads


class _KeepInGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.detach()  # a view of x would not allow in-place operations on the output, as a plain layer does

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return grad, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def keep_in_graph(x: Tensor, *parameters: Tensor) -> Tensor:
    """x itself (its storage); parameters that do not act get gradient zero instead of none.

    DDP and FSDP need every trainable parameter in every step's graph, and an optimizer must not start counting late.
    """
    acting = [parameter for parameter in parameters if parameter.requires_grad]
    if not acting or not torch.is_grad_enabled():
        return x
    return _KeepInGraph.apply(x, *acting)  # type: ignore[no-any-return]
