"""One autograd function for every layer that multiplies a quantized input with a quantized weight.

y = op(Q_x(x), Q_w(w)) + b. Plain composition would keep both quantized tensors and several intermediates alive until
backward. Here backward recomputes the quantized weight from the live weight, and the quantized input from its codes, so
a converted layer saves no weight copy, and less than a float layer where the input is quantized.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlightning.adapters.inside import Inside
from qlightning.numerics.autograd import keep_in_graph
from qlightning.numerics.tensor_quantizer import State, TensorQuantizer


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
    input_quantizer: TensorQuantizer | None,
    weight_quantizer: TensorQuantizer | None,
    *,
    inside: Inside | None = None,
) -> Tensor:
    """`op(Q_x(x), Q_w(w)) + b`; a quantizer that is None or disabled leaves its operand alone.

    Args:
        op: The operation.
        x: Its input.
        weight: Its weight.
        bias: Its bias.
        input_quantizer: Q_x, which sees features last.
        weight_quantizer: Q_w, which sees the matrix (output channels, fan-in).
        inside: An adapter: Q_w sees its effective weight.
    """
    if input_quantizer is not None and not input_quantizer.enabled:
        x = op.features_back(input_quantizer.bypass(op.features_last(x)))
        input_quantizer = None
    kept: list[Tensor] = []
    if weight_quantizer is not None and not weight_quantizer.enabled:
        kept = list(weight_quantizer.learned())
        weight_quantizer = None
    tensors = () if inside is None else inside.tensors()
    acting = [quantizer for quantizer in (input_quantizer, weight_quantizer) if quantizer is not None]
    if x.numel() == 0 or not (acting or inside):
        kept += [parameter for quantizer in acting for parameter in quantizer.learned()]
        return keep_in_graph(op.forward(x, weight, bias), *kept, *tensors)
    x_state, x_key = _prepare(input_quantizer, op.features_last(x))
    w_state, w_key = _prepare_weight(op, weight, weight_quantizer, inside)
    sizes = len(x_state), len(w_state), len(tensors)
    static = _Static(op, input_quantizer, weight_quantizer, inside, _autocast_dtype(x), sizes)
    y: Tensor = _Contract.apply(x, weight, bias, static, x_key, w_key, *x_state, *w_state, *tensors)
    return keep_in_graph(y, *kept)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would cast `x` to, or None where it would leave it alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype)


def _prepare(quantizer: TensorQuantizer | None, x: Tensor) -> tuple[State, Tensor | None]:
    return ((), None) if quantizer is None else (quantizer.prepare(x), quantizer.rounding.key())


def _prepare_weight(
    op: Operation, weight: Tensor, quantizer: TensorQuantizer | None, inside: Inside | None
) -> tuple[State, Tensor | None]:
    if quantizer is None:
        return (), None
    if inside is None:
        return _prepare(quantizer, op.matrix(weight))
    with torch.no_grad():
        effective = inside.effective(op.matrix(weight), inside.tensors())
    return _prepare(quantizer, effective)


class _Static(NamedTuple):
    """What the autograd function is told beside tensors."""

    op: Operation
    x_quantizer: TensorQuantizer | None
    w_quantizer: TensorQuantizer | None
    inside: Inside | None
    dtype: torch.dtype | None
    sizes: tuple[int, int, int]

    def split(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """The input's state, the weight's, and the adapter's tensors."""
        x, w, _ = self.sizes
        return tuple(tensors[:x]), tuple(tensors[x : x + w]), tuple(tensors[x + w :])

    def matrix(self, weight: Tensor, adapter: Sequence[Tensor]) -> Tensor:
        """What the weight quantizer sees."""
        matrix = self.op.matrix(weight)
        return matrix if self.inside is None else self.inside.effective(matrix, adapter)

    def weight_values(self, weight: Tensor, matrix: Tensor, state: State, key: Tensor | None) -> Tensor:
        """The weight that is multiplied with, from the matrix that its quantizer sees."""
        if self.w_quantizer is None and self.inside is None:
            return _cast(weight, self.dtype)
        values = matrix if self.w_quantizer is None else self.w_quantizer.values(matrix, state, key)
        return _cast(self.op.unmatrix(values, weight), self.dtype)

    def input_values(self, kept: Tensor, decoded: bool, state: State, key: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The input that is multiplied with, again, from its codes where these were kept."""
        if self.x_quantizer is None:
            return _cast(kept, self.dtype)
        if decoded:
            values = self.x_quantizer.decode(kept, state).to(dtype)
        else:
            values = self.x_quantizer.values(self.op.features_last(kept), state, key)
        return _cast(self.op.features_back(values), self.dtype)


class _Contract(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        static: _Static,
        x_key: Tensor | None,
        w_key: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        op, quantizer = static.op, static.x_quantizer
        x_state, w_state, adapter = static.split(tensors)
        wants_weight = any(ctx.needs_input_grad[1:2] + ctx.needs_input_grad[6 + len(x_state) :])
        kept_x, ctx.decoded = None, False
        if quantizer is None:
            q_x = _cast(x, static.dtype)
            kept_x = q_x if wants_weight else None
        else:
            rows = op.features_last(x)
            if quantizer.needs_input or not wants_weight:
                kept_x = x if quantizer.needs_input else None
                values = quantizer.values(rows, x_state, x_key)
            else:
                values, kept_x = quantizer.values_and_codes(rows, x_state, x_key)
                ctx.decoded = True
            q_x = _cast(op.features_back(values), static.dtype)
        q_w = static.weight_values(weight, static.matrix(weight, adapter), w_state, w_key)
        ctx.static, ctx.x_shape, ctx.x_dtype = static, x.shape, x.dtype
        recomputable = static.w_quantizer is not None and static.w_quantizer.recomputable
        kept_state = () if recomputable else w_state
        ctx.save_for_backward(kept_x, weight, x_key, w_key, *x_state, *adapter, *kept_state)
        y = op.forward(q_x, q_w, None if bias is None else _cast(bias, static.dtype))
        return y.detach()  # it may be a view, on which a plain layer's user may work in place and we could not

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        static: _Static = ctx.static
        op, wants = static.op, ctx.needs_input_grad
        kept_x, weight, x_key, w_key, *tensors = ctx.saved_tensors
        n_x, n_w, n_adapter = static.sizes
        x_state, w_state = tuple(tensors[:n_x]), tuple(tensors[n_x + n_adapter :])
        adapter = tensors[n_x : n_x + n_adapter]
        x_wants, w_wants, adapter_wants = static.split(wants[6:])
        matrix = static.matrix(weight, adapter)
        if static.w_quantizer is not None and not w_state:
            w_state = static.w_quantizer.grid(matrix)
        grad_x = grad_w = grad_b = None
        x_grads: Sequence[Tensor | None] = (None,) * n_x
        w_grads: Sequence[Tensor | None] = (None,) * n_w
        adapter_grads: Sequence[Tensor | None] = (None,) * n_adapter

        if wants[0] or any(x_wants):
            q_w = static.weight_values(weight, matrix, w_state, w_key)
            grad_x = op.grad_input(grad, ctx.x_shape, q_w).to(ctx.x_dtype)
            if static.x_quantizer is not None:
                raw_x = None if kept_x is None or ctx.decoded else op.features_last(kept_x)
                rows, *x_grads = static.x_quantizer.gradients(op.features_last(grad_x), raw_x, x_state, x_key, x_wants)
                grad_x = op.features_back(rows)

        if wants[1] or any(w_wants) or any(adapter_wants):
            q_x = static.input_values(kept_x, ctx.decoded, x_state, x_key, ctx.x_dtype)
            rows = op.matrix(op.grad_weight(grad, q_x, weight).to(weight.dtype))
            if static.w_quantizer is not None:
                rows, *w_grads = static.w_quantizer.gradients(rows, matrix, w_state, w_key, w_wants)
            if static.inside is not None:
                adapter_grads = static.inside.gradients(rows, adapter)
            grad_w = op.unmatrix(rows, weight) if wants[1] else None

        if wants[2]:
            grad_b = op.grad_bias(grad)
        return (grad_x, grad_w, grad_b, None, None, None, *x_grads, *w_grads, *adapter_grads)
