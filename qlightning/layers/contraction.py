"""One autograd function for every layer that multiplies a quantized input with a quantized weight.

y = op(Q_x(x), Q_w(w)) + b. Plain composition would keep both quantized tensors and several intermediates alive until
backward. Here backward recomputes the quantized weight from the live weight, and the quantized input from its codes, so
a converted layer saves no weight copy, and less than a float layer where the input is quantized. Where the operands of
backward have quantizers of their own (`backward.py`), the input is kept as the codes that the weight's gradient needs.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlightning.adapters.inside import Inside
from qlightning.layers.backward import Backward
from qlightning.layers.kept_weight import Reuse, reuse_of
from qlightning.layers.on_codes import OnCodes, Product, as_matrix, encoded, measured
from qlightning.layers.operation import Operation
from qlightning.layers.sharding import in_parallel
from qlightning.numerics.autograd import keep_in_graph
from qlightning.numerics.code_product import Coded, product_of_codes
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.scales import Grid
from qlightning.numerics.tensor_quantizer import State, TensorQuantizer


def contract(
    op: Operation,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_quantizer: TensorQuantizer | None,
    weight_quantizer: TensorQuantizer | None,
    *,
    inside: Inside | None = None,
    backward: Backward | None = None,
    on_codes: OnCodes | None = None,
) -> Tensor:
    """`op(Q_x(x), Q_w(w)) + b`; a quantizer that is None or disabled leaves its operand alone.

    Args:
        op: The operation; a matrix product where there is a `backward`.
        x: Its input.
        weight: Its weight.
        bias: Its bias.
        input_quantizer: Q_x, which sees features last.
        weight_quantizer: Q_w, which sees the matrix (output channels, fan-in).
        inside: An adapter: Q_w sees its effective weight.
        backward: What the operands of backward are quantized with, from when on Q_w acts (also once it is released).
        on_codes: Which products are those of codes.
    """
    if hasattr(weight, "placements"):
        raise ValueError(in_parallel("a layer"))
    if not _has_begun(weight_quantizer):
        backward = None
    kept: list[Tensor] = []
    arrived: Coded | None = None
    gathered = weight_quantizer is not None and weight_quantizer.gathered  # then the arithmetic is still this one
    x_on, w_on = (quantizer is not None and quantizer.acts for quantizer in (input_quantizer, weight_quantizer))
    if input_quantizer is not None and not x_on:
        x = op.features_back(input_quantizer.bypass(op.features_last(x)))
        input_quantizer = input_quantizer if backward and _has_begun(input_quantizer) else None
    if weight_quantizer is not None and not w_on:
        kept, arrived = list(weight_quantizer.learned()), weight_quantizer.arrived
        weight_quantizer = weight_quantizer if backward and not gathered else None
    tensors = () if inside is None else inside.tensors()
    present = [quantizer for quantizer in (input_quantizer, weight_quantizer) if quantizer is not None]
    if x.numel() == 0 or not (x_on or w_on or gathered or inside or (present and torch.is_grad_enabled())):
        kept += [parameter for quantizer in present for parameter in quantizer.learned()]
        return keep_in_graph(op.forward(x, _of_float(weight, x), bias), *kept, *tensors)
    x_state, x_key = _prepare(input_quantizer, op.features_last(x))
    reuse = reuse_of(weight_quantizer, weight, tensors)
    w_state, w_key = _prepare_weight(op, weight, weight_quantizer, inside, reuse)
    keys = () if backward is None else backward.keys()
    sizes = len(x_state), len(w_state), len(tensors), len(keys)
    static = _Static(
        op,
        input_quantizer,
        weight_quantizer,
        x_on,
        w_on,
        inside,
        backward,
        on_codes,
        _autocast_dtype(x),
        sizes,
        reuse,
        arrived,
    )
    y: Tensor = _Contract.apply(x, weight, bias, static, x_key, w_key, *x_state, *w_state, *tensors, *keys)
    return keep_in_graph(y, *kept)


def _has_begun(quantizer: TensorQuantizer | None) -> bool:
    return quantizer is not None and (quantizer.enabled or quantizer.released)


def _of_float(weight: Tensor, x: Tensor) -> Tensor:
    """The weight as something that x can be multiplied with: an adapter may keep it as integers."""
    return weight if weight.is_floating_point() else weight.to(x.dtype)


# asked once, here: torch.compile cannot trace the question before torch 2.12
_WITH_AUTOCAST = frozenset(
    kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "xla") if torch.amp.is_autocast_available(kind)
)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would cast `x` to, or None where it would leave it alone."""
    device = x.device.type
    if x.dtype == torch.float64 or device not in _WITH_AUTOCAST:
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype)


def _prepare(quantizer: TensorQuantizer | None, x: Tensor) -> tuple[State, Tensor | None]:
    return ((), None) if quantizer is None else (quantizer.prepare(x), quantizer.rounding.key())


def _prepare_weight(
    op: Operation, weight: Tensor, quantizer: TensorQuantizer | None, inside: Inside | None, reuse: Reuse | None
) -> tuple[State, Tensor | None]:
    if quantizer is None:
        return (), None
    if reuse is not None and reuse.keeps_state:
        make = _prepare_weight
        return reuse.get("state", lambda: make(op, weight, quantizer, inside, None)[0]), quantizer.rounding.key()
    if inside is None:
        return _prepare(quantizer, op.matrix(weight))
    with torch.no_grad():
        effective = inside.effective(op.matrix(weight), inside.tensors())
    return _prepare(quantizer, effective)


class _Static(NamedTuple):
    """What the autograd function is told beside tensors.

    `x_on` and `w_on` say whether fprop quantizes; backward may go on with a quantizer that fprop has released. A
    sharded weight, which is its values already and has no quantizer here, may have `arrived` as codes.
    """

    op: Operation
    x_quantizer: TensorQuantizer | None
    w_quantizer: TensorQuantizer | None
    x_on: bool
    w_on: bool
    inside: Inside | None
    backward: Backward | None
    on_codes: OnCodes | None
    dtype: torch.dtype | None
    sizes: tuple[int, int, int, int]
    reuse: Reuse | None
    arrived: Coded | None

    def split(self, tensors: Sequence[Any]) -> list[tuple[Any, ...]]:
        """The input's state, the weight's, the adapter's tensors, and the keys of backward's slots."""
        return _split(tensors, self.sizes)

    def matrix(self, weight: Tensor, adapter: Sequence[Tensor]) -> Tensor:
        """What the weight quantizer sees."""
        matrix = self.op.matrix(weight)
        return matrix if self.inside is None else self.inside.effective(matrix, adapter)

    def weight_values(
        self, weight: Tensor, matrix: Tensor, state: State, key: Tensor | None, quantized: bool
    ) -> Tensor:
        """The weight that is multiplied with, from the matrix that its quantizer sees."""
        if not quantized and self.inside is None:
            return _cast(weight, self.dtype)
        if self.reuse is not None and quantized:
            make = self._replace(reuse=None).weight_values
            return self.reuse.get(("values", self.dtype), lambda: make(weight, matrix, state, key, True))
        values = self.w_quantizer.values(matrix, state, key) if quantized and self.w_quantizer is not None else matrix
        return _cast(self.op.unmatrix(values, weight), self.dtype)

    def dgrad(
        self, grad: Tensor, x_shape: torch.Size, weight: Tensor, matrix: Tensor, state: State, keys: Sequence[Any]
    ) -> Tensor:
        """The gradient of the quantized input; `keys` are the weight quantizer's and those of the slots."""
        key, grad_key, weight_key, *_ = keys
        backward, quantized, own = self.backward, self.w_on, None
        if backward is not None:
            own, own_weight = backward.own("grad_dgrad"), backward.own("weight_dgrad")
            if self.codes_act("dgrad", own, own_weight):
                codes = encoded(own, self.op.features_last(grad), grad_key), encoded(own_weight, matrix.t(), weight_key)
                return self.op.features_back(product_of_codes(*codes, None, grad.dtype).view(x_shape))
            if own is not None:
                grad = self.op.features_back(_quantized(own, self.op.features_last(grad), grad_key))
            quantized, own = backward.same("weight_dgrad"), own_weight
        if own is None:
            q_w = self.weight_values(weight, matrix, state, key, quantized)
        else:
            q_w = _cast(self.op.unmatrix(_quantized(own, matrix.t(), weight_key).t(), weight), self.dtype)
        return self.op.grad_input(grad, x_shape, q_w)

    def codes_act(self, product: Product, *quantizers: TensorQuantizer | None) -> bool:
        """Whether this product is one of codes."""
        return self.on_codes is not None and self.on_codes.acts(product, *quantizers)

    def multiply(
        self,
        x: Tensor,
        q_x: Tensor | Coded,
        weight: Tensor,
        matrix: Tensor,
        state: State,
        key: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """The layer's output, with the input that `take_input` gives."""
        if isinstance(q_x, Coded):
            make = functools.partial(encoded, self.w_quantizer, matrix, key, state)
            if self.arrived is not None:
                q_codes = self.arrived
            else:
                q_codes = make() if self.reuse is None else self.reuse.get("codes", make)
            y = product_of_codes(q_x, q_codes, bias, self.dtype or x.dtype)
            return self.op.features_back(y.view(*self.op.features_last(x).shape[:-1], y.shape[-1]))
        q_w = self.weight_values(weight, matrix, state, key, self.w_on)
        return self.op.forward(q_x, q_w, None if bias is None else _cast(bias, self.dtype))

    def keeper(self) -> TensorQuantizer | None:
        """What quantizes the input for the weight's gradient."""
        if self.backward is None:
            return self.x_quantizer
        own = self.backward.own("input_wgrad")
        return own if own is not None else self.x_quantizer if self.backward.same("input_wgrad") else None

    def take_input(
        self, x: Tensor, state: State, key: Tensor | None, own_key: Tensor | None, wants_weight: bool
    ) -> tuple[Tensor | Coded, "_Kept"]:
        """The input that is multiplied with, decoded or as codes, and what is kept of it for backward."""
        quantizer, keeper = self.x_quantizer, self.keeper() if wants_weight else None
        needs_x = self.x_on and quantizer is not None and quantizer.needs_input
        rows, values, kept = self.op.features_last(x), None, None
        operands = (quantizer,) if self.arrived is not None else (quantizer, self.w_quantizer)
        coded = encoded(quantizer, rows, key, state) if self.codes_act("fprop", *operands) else None
        if keeper is not None and not keeper.needs_input and not needs_x:
            if keeper is quantizer:
                if coded is None:
                    values, codes = keeper.values_and_codes(rows, state, key)
                else:
                    codes = coded.codes.view(rows.shape)
                kept = _Kept(codes, True)
            else:
                assert self.backward is not None
                assert isinstance(keeper, Quantizer)  # others need their input
                codes, own_state = measured(keeper, self.backward.tokens_last(rows), own_key)
                kept = _Kept(codes, True, own_state)
        q_x: Tensor | Coded
        if coded is not None:
            q_x, taken = coded, x
        elif not self.x_on or quantizer is None:
            q_x = taken = _cast(x, self.dtype)
        else:
            values = quantizer.values(rows, state, key) if values is None else values
            q_x, taken = _cast(self.op.features_back(values), self.dtype), x
        if kept is None:
            wanted = needs_x or wants_weight
            kept = _Kept((x if needs_x or keeper is not None else _cast(taken, self.dtype)) if wanted else None, False)
        return q_x, kept

    def input_again(
        self, kept: "_Kept", state: State, key: Tensor | None, own_key: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """The input as the weight's gradient multiplies with it: features last, or tokens last before a `backward`."""
        assert kept.tensor is not None
        keeper, backward = self.keeper(), self.backward
        if backward is not None and (own := backward.own("input_wgrad")) is not None:
            if kept.decoded:
                return own.decode(kept.tensor, kept.state)
            return _quantized(own, backward.tokens_last(kept.tensor), own_key)
        if keeper is None:
            rows = self.op.features_last(_cast(kept.tensor, self.dtype))
        elif kept.decoded:
            rows = keeper.decode(kept.tensor, state).to(dtype)
        else:
            rows = keeper.values(self.op.features_last(kept.tensor), state, key)
        rows = _cast(rows, self.dtype)
        return rows if backward is None else backward.tokens_last(rows)

    def wgrad(
        self, grad: Tensor, kept: "_Kept", weight: Tensor, x_state: State, keys: Sequence[Any], dtype: torch.dtype
    ) -> Tensor:
        """The gradient of the weight's matrix; `keys` are the input quantizer's and those of the slots."""
        x_key, *_, key, own_key = keys
        if self.backward is None:
            q_x = self.op.features_back(self.input_again(kept, x_state, x_key, own_key, dtype))
            return self.op.matrix(self.op.grad_weight(grad, q_x, weight))
        operand = self.backward.tokens_last(self.op.features_last(grad))
        own, own_input = self.backward.own("grad_wgrad"), self.backward.own("input_wgrad")
        if self.codes_act("wgrad", own, own_input):
            assert kept.tensor is not None
            if kept.decoded:
                coded = as_matrix(kept.tensor, Grid(*kept.state).step)
            else:
                coded = encoded(own_input, self.backward.tokens_last(kept.tensor), own_key)
            return product_of_codes(encoded(own, operand, key), coded, None, grad.dtype)
        q_x = self.input_again(kept, x_state, x_key, own_key, dtype)
        if own is not None:
            operand = _quantized(own, operand, key)
        return operand.to(grad.dtype) @ q_x.to(grad.dtype).t()


class _Kept(NamedTuple):
    """What is kept of the input.

    Attributes:
        tensor: The input itself, or its codes.
        decoded: Whether it is codes.
        state: The state of codes that are of backward's own quantizer.
    """

    tensor: Tensor | None
    decoded: bool
    state: State = ()


def _quantized(quantizer: TensorQuantizer, x: Tensor, key: Tensor | None) -> Tensor:
    return quantizer.values(x, quantizer.grid(x), key)


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
        x_state, w_state, adapter, keys = static.split(tensors)
        wants_weight = any(ctx.needs_input_grad[1:2] + ctx.needs_input_grad[6 + len(x_state) :])
        q_x, kept = static.take_input(x, x_state, x_key, keys[-1] if keys else None, wants_weight)
        recomputable = static.w_quantizer is not None and static.w_quantizer.recomputable
        kept_w = () if recomputable else w_state
        if kept.state:  # then neither values nor gradients of fprop's quantizer are made again
            x_state = (None,) * len(x_state)
        ctx.static, ctx.x_shape, ctx.x_dtype = static, x.shape, x.dtype
        ctx.decoded, ctx.sizes = kept.decoded, (len(x_state), len(kept_w), len(adapter), len(keys), len(kept.state))
        ctx.save_for_backward(kept.tensor, weight, x_key, w_key, *x_state, *kept_w, *adapter, *keys, *kept.state)
        y = static.multiply(x, q_x, weight, static.matrix(weight, adapter), w_state, w_key, bias)
        return y.detach()  # it may be a view, on which a plain layer's user may work in place and we could not

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        static: _Static = ctx.static
        op, wants = static.op, ctx.needs_input_grad
        kept_x, weight, x_key, w_key, *tensors = ctx.saved_tensors
        x_state, w_state, adapter, keys, own_state = _split(tensors, ctx.sizes)
        keys = keys or (None,) * 4
        x_wants, w_wants, adapter_wants, _ = static.split(wants[6:])
        matrix = static.matrix(weight, adapter)
        if static.w_quantizer is not None and not w_state:
            find = functools.partial(static.w_quantizer.grid, matrix)
            w_state = static.reuse.get("state", find) if static.reuse and static.reuse.keeps_state else find()
        grad_x = grad_w = None
        x_grads, w_grads, adapter_grads, key_grads = (_no_gradients(size) for size in static.sizes)

        if wants[0] or any(x_wants):
            grad_x = static.dgrad(grad, ctx.x_shape, weight, matrix, w_state, (w_key, *keys)).to(ctx.x_dtype)
            if static.x_quantizer is not None and static.x_on:
                raw_x = None if kept_x is None or ctx.decoded else op.features_last(kept_x)
                rows, *x_grads = static.x_quantizer.gradients(op.features_last(grad_x), raw_x, x_state, x_key, x_wants)
                grad_x = op.features_back(rows)

        if wants[1] or any(w_wants) or any(adapter_wants):
            kept = _Kept(kept_x, ctx.decoded, own_state)
            rows = static.wgrad(grad, kept, weight, x_state, (x_key, *keys), ctx.x_dtype).to(matrix.dtype)
            if static.w_quantizer is not None and static.w_on:
                rows, *w_grads = static.w_quantizer.gradients(rows, matrix, w_state, w_key, w_wants)
            if static.inside is not None:
                adapter_grads = static.inside.gradients(rows, adapter)
            grad_w = op.unmatrix(rows, weight) if wants[1] else None

        grad_b = op.grad_bias(grad) if wants[2] else None
        return (grad_x, grad_w, grad_b, None, None, None, *x_grads, *w_grads, *adapter_grads, *key_grads)


def _no_gradients(count: int) -> Sequence[Tensor | None]:
    return (None,) * count


def _split(tensors: Sequence[Any], sizes: Sequence[int]) -> list[tuple[Any, ...]]:
    ends = itertools.accumulate(sizes)
    return [tuple(tensors[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
