"""One autograd function for every layer that multiplies a quantized input with a quantized weight.

y = op(Q_x(x), Q_w(w)) + b. Plain composition would keep both quantized tensors and several intermediates alive until
backward. Here backward recomputes the quantized weight from the live weight, and the quantized input from its codes, so
a converted layer saves no weight copy, and less than a float layer where the input is quantized.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlightning.numerics.autograd import keep_in_graph
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.scales import Grid


class Operation(ABC):
    """A bilinear operation `(x, w) -> y` with its two adjoints, and the views in which quantizers see x and w."""

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as (output channels, fan-in)."""

    @abstractmethod
    def unmatrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """The inverse of `matrix`, in the shape of `weight`."""

    @abstractmethod
    def features_last(self, x: Tensor) -> Tensor:
        """The input as (..., features)."""

    @abstractmethod
    def features_back(self, x: Tensor) -> Tensor:
        """The inverse of `features_last`."""

    @abstractmethod
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """op(x, w) + b."""

    @abstractmethod
    def grad_input(self, grad: Tensor, x_shape: torch.Size, weight: Tensor) -> Tensor:
        """Gradient with respect to x."""

    @abstractmethod
    def grad_weight(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient with respect to the weight; `weight` is given for its shape."""

    @abstractmethod
    def grad_bias(self, grad: Tensor) -> Tensor:
        """Gradient with respect to the bias."""


def contract(
    op: Operation,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_quantizer: Quantizer | None,
    weight_quantizer: Quantizer | None,
) -> Tensor:
    """`op(Q_x(x), Q_w(w)) + b`; a quantizer that is None or disabled leaves its operand alone."""
    if input_quantizer is not None and not input_quantizer.enabled:
        x = op.features_back(input_quantizer.bypass(op.features_last(x)))
        input_quantizer = None
    kept: list[Tensor] = []
    if weight_quantizer is not None and not weight_quantizer.enabled:
        kept = list(weight_quantizer.learned())
        weight_quantizer = None
    acting = [quantizer for quantizer in (input_quantizer, weight_quantizer) if quantizer is not None]
    if x.numel() == 0 or not acting:
        kept += [parameter for quantizer in acting for parameter in quantizer.learned()]
        return keep_in_graph(op.forward(x, weight, bias), *kept)
    x_grid, x_key = _prepare(input_quantizer, op.features_last(x))
    w_grid, w_key = _prepare(weight_quantizer, op.matrix(weight))
    static = (op, input_quantizer, weight_quantizer, _autocast_dtype(x))
    return keep_in_graph(_Contract.apply(x, weight, bias, *x_grid, x_key, *w_grid, w_key, static), *kept)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would cast `x` to, or None where it would leave it alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype)


def _prepare(quantizer: Quantizer | None, x: Tensor) -> tuple[Grid | tuple[None, None, None], Tensor | None]:
    if quantizer is None:
        return (None, None, None), None
    return quantizer.prepare(x), quantizer.rounding.key()


class _Contract(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_scale: Tensor | None,
        x_zero: Tensor | None,
        x_tensor_scale: Tensor | None,
        x_key: Tensor | None,
        w_scale: Tensor | None,
        w_zero: Tensor | None,
        w_tensor_scale: Tensor | None,
        w_key: Tensor | None,
        static: tuple[Operation, Quantizer | None, Quantizer | None, torch.dtype | None],
    ) -> Tensor:
        op, x_quantizer, w_quantizer, dtype = static
        wants_weight = weight.requires_grad or (w_scale is not None and w_scale.requires_grad)
        kept_x = x_codes = None
        if x_quantizer is None or x_scale is None:
            q_x = _cast(x, dtype)
            kept_x = q_x if wants_weight else None
        else:
            rows, grid = op.features_last(x), Grid(x_scale, x_zero, x_tensor_scale)
            if x_quantizer.needs_input:
                kept_x = x
                values = x_quantizer.values(rows, grid, x_key)
            elif wants_weight:
                values, x_codes = x_quantizer.values_and_codes(rows, grid, x_key)
            else:
                values = x_quantizer.values(rows, grid, x_key)
            q_x = _cast(op.features_back(values), dtype)
        q_w = _weight_values(op, w_quantizer, weight, (w_scale, w_zero, w_tensor_scale), w_key)
        ctx.static, ctx.x_shape, ctx.x_dtype = static, x.shape, x.dtype
        kept_grid = (None, None, None) if _recomputable(w_quantizer) else (w_scale, w_zero, w_tensor_scale)
        ctx.save_for_backward(kept_x, x_codes, weight, x_scale, x_zero, x_tensor_scale, x_key, *kept_grid, w_key)
        y = op.forward(q_x, _cast(q_w, dtype), None if bias is None else _cast(bias, dtype))
        return y.detach()  # it may be a view, on which a plain layer's user may work in place and we could not

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        op, x_quantizer, w_quantizer, dtype = ctx.static
        kept_x, x_codes, weight, x_scale, x_zero, x_tensor, x_key, w_scale, w_zero, w_tensor, w_key = ctx.saved_tensors
        x_grid, w_grid = Grid(x_scale, x_zero, x_tensor), Grid(w_scale, w_zero, w_tensor)
        if w_quantizer is not None and w_scale is None:
            w_grid = w_quantizer.grid(op.matrix(weight))
        wants = ctx.needs_input_grad
        grad_x = grad_w = grad_b = x_scale_grad = x_zero_grad = w_scale_grad = w_zero_grad = None

        if wants[0] or wants[3] or wants[4]:
            q_w = _weight_values(op, w_quantizer, weight, w_grid, w_key)
            q_w = _cast(q_w, dtype)
            grad_x = op.grad_input(grad, ctx.x_shape, q_w).to(ctx.x_dtype)
            if x_quantizer is not None:
                raw_x = None if kept_x is None else op.features_last(kept_x)
                rows, x_scale_grad, x_zero_grad = x_quantizer.gradients(
                    op.features_last(grad_x), raw_x, x_grid, x_key, scale=wants[3], zero=wants[4]
                )
                grad_x = op.features_back(rows)

        if wants[1] or wants[7] or wants[8]:
            q_x = _input_values(op, x_quantizer, kept_x, x_codes, x_grid, x_key, ctx.x_dtype)
            grad_w = op.grad_weight(grad, _cast(q_x, dtype), weight).to(weight.dtype)
            if w_quantizer is not None:
                rows, w_scale_grad, w_zero_grad = w_quantizer.gradients(
                    op.matrix(grad_w), op.matrix(weight), w_grid, w_key, scale=wants[7], zero=wants[8]
                )
                grad_w = op.unmatrix(rows, weight)

        if wants[2]:
            grad_b = op.grad_bias(grad)
        return (
            *(grad_x, grad_w, grad_b),
            *(x_scale_grad, x_zero_grad, None, None),
            *(w_scale_grad, w_zero_grad, None, None),
            None,
        )


def _recomputable(quantizer: Quantizer | None) -> bool:
    """Whether backward finds the same grid again from the weight or the learned scale, so that it need not be saved."""
    return quantizer is not None and (quantizer.scale.learned or not quantizer.scale.static)


def _weight_values(op: Operation, quantizer: Quantizer | None, weight: Tensor, grid: Any, key: Tensor | None) -> Tensor:
    if quantizer is None:
        return weight
    return op.unmatrix(quantizer.values(op.matrix(weight), Grid(*grid), key), weight)


def _input_values(
    op: Operation,
    quantizer: Quantizer | None,
    kept: Tensor | None,
    codes: Tensor | None,
    grid: Any,
    key: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The quantized input again, from its codes where these were kept."""
    if codes is not None and quantizer is not None:
        return op.features_back(quantizer.decode(codes, grid).to(dtype))
    assert kept is not None
    if quantizer is None:
        return kept
    return op.features_back(quantizer.values(op.features_last(kept), grid, key))
