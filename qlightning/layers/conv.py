"""Quantized twins of the convolutions.

A convolution's weight is quantized as the matrix (output channels, fan-in): groups run along input channels and kernel
positions. Its input is quantized with channels as features: per token means per position (and picture).
"""

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlightning.layers.contraction import contract
from qlightning.layers.layer import Twin
from qlightning.layers.operation import Operation


class _Convolution(Operation, ABC):
    """y = conv(x, W) + b for W of any number of spatial dimensions.

    Args:
        layer: The convolution whose geometry it takes over.
        padding: Zeros on both sides of each spatial dimension.
        output_padding: What a transposed convolution adds to one side of its output.
        uneven: Further zeros on single sides, in the order of `F.pad`.
    """

    transposed: bool

    def __init__(
        self, layer: "_ConvTwin", padding: Sequence[int], output_padding: Sequence[int], *, uneven: Sequence[int] = ()
    ) -> None:
        self.stride, self.dilation, self.groups = list(layer.stride), list(layer.dilation), layer.groups
        self.padding, self.output_padding, self.uneven = list(padding), list(output_padding), list(uneven)

    def features_last(self, x: Tensor) -> Tensor:
        return x.movedim(-len(self.stride) - 1, -1)

    def features_back(self, x: Tensor) -> Tensor:
        return x.movedim(-1, -len(self.stride) - 1)

    def grad_input(self, grad: Tensor, x_shape: torch.Size, weight: Tensor) -> Tensor:
        like = _pad(grad.new_empty(1).expand(x_shape), self.uneven)
        return _pad(self._backward(grad, like, weight, [True, False, False])[0], [-n for n in self.uneven])

    def grad_weight(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        like = torch.empty((), dtype=x.dtype, device=x.device).expand(weight.shape)
        return self._backward(grad, _pad(x, self.uneven), like, [False, True, False])[1]

    def grad_bias(self, grad: Tensor) -> Tensor:
        return grad.movedim(-len(self.stride) - 1, 0).flatten(1).sum(1)

    def _backward(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
        geometry = (self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, wanted)


def _pad(x: Tensor, sides: Sequence[int]) -> Tensor:
    return F.pad(x, list(sides)) if any(sides) else x


class _Forward(_Convolution):
    """W (out, in / groups, *kernel)."""

    transposed = False

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv = F.conv1d if len(self.stride) == 1 else F.conv2d
        return conv(_pad(x, self.uneven), weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def unmatrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix.view(weight.shape)


class _Transposed(_Convolution):
    """W (in, out / groups, *kernel): the output channels of a group are dimension 1."""

    transposed = True

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv = F.conv_transpose1d if len(self.stride) == 1 else F.conv_transpose2d
        return conv(x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation)

    def matrix(self, weight: Tensor) -> Tensor:
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:])
        return grouped.transpose(1, 2).flatten(0, 1).flatten(1)

    def unmatrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        inputs = weight.shape[0] // self.groups
        grouped = matrix.view(self.groups, weight.shape[1], inputs, *weight.shape[2:])
        return grouped.transpose(1, 2).reshape(weight.shape)


class _ConvTwin(Twin, ABC):
    """The geometry that all convolutions have."""

    places = ("transform", "adapter")
    weight: Tensor
    bias: Tensor | None
    in_channels: int
    out_channels: int
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    kernel_size: tuple[int, ...]
    padding_mode: str
    groups: int
    _reversed_padding_repeated_twice: list[int]

    def features(self) -> int:
        return self.in_channels

    def output_features(self) -> int:
        return self.out_channels


class ConvTwin(_ConvTwin):
    """`nn.Conv1d` and `nn.Conv2d` with quantized weight, input and output: x (N, C, *spatial)."""

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return any(isinstance(module, c) and type(module).forward is c.forward for c in (nn.Conv1d, nn.Conv2d))

    def weights(self) -> Mapping[str, Tensor]:
        return {"weight": self.weight.flatten(1)}

    def laid_out(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.weight.shape)

    @staticmethod
    def multiply_adds(module: nn.Module, inputs: Any, output: Any) -> int:
        return output.numel() * _per_row(module)

    def forward(self, input: Tensor) -> Tensor:
        none = (0,) * len(self.stride)
        sides = self._reversed_padding_repeated_twice
        # Padding comes after quantization: it holds no values of the input's own, and not every format has a zero.
        if self.padding_mode != "zeros":
            return _run(self, _Forward(self, none, none), input, lambda x: F.pad(x, sides, mode=self.padding_mode))
        if not isinstance(self.padding, str):
            return _run(self, _Forward(self, self.padding, none), input)
        both = [min(pair) for pair in zip(sides[::2], sides[1::2], strict=True)]
        uneven = [n - both[i // 2] for i, n in enumerate(sides)]
        return _run(self, _Forward(self, both[::-1], none, uneven=uneven), input)


class ConvTransposeTwin(_ConvTwin):
    """`nn.ConvTranspose1d` and `nn.ConvTranspose2d` with quantized weight, input and output: x (N, C, *spatial)."""

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d)
        return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)

    def weights(self) -> Mapping[str, Tensor]:
        return {"weight": self._operation(self.output_padding).matrix(self.weight)}

    def laid_out(self, matrix: Tensor) -> Tensor:
        return self._operation(self.output_padding).unmatrix(matrix, self.weight)

    @staticmethod
    def multiply_adds(module: nn.Module, inputs: Any, output: Any) -> int:
        return inputs[0].numel() * _per_row(module)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        geometry = (self.stride, self.padding, self.kernel_size, len(self.stride), self.dilation)
        extra = nn.modules.conv._ConvTransposeNd._output_padding(self, input, output_size, *geometry)  # type: ignore[arg-type]
        return _run(self, self._operation(extra), input)

    def _operation(self, output_padding: Sequence[int]) -> _Transposed:
        assert not isinstance(self.padding, str)
        return _Transposed(self, self.padding, output_padding)


def _per_row(module: nn.Module) -> int:
    assert isinstance(module.weight, Tensor)
    return module.weight.flatten(1).shape[1]


def _run(layer: _ConvTwin, op: _Convolution, x: Tensor, pad: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    batched = x if x.dim() == len(op.stride) + 2 else x.unsqueeze(0)
    batched = op.features_back(layer.transformed(op.features_last(batched)))
    quantizer, input = layer.quantizer("input"), batched
    if pad is not None:
        input = pad(batched if quantizer is None else op.features_back(quantizer(op.features_last(batched))))
        quantizer = None
    y = contract(op, input, layer.weight, layer.bias, quantizer, layer.quantizer("weight"), inside=layer.inside())
    output = layer.quantizer("output")
    if output is not None:
        y = op.features_back(output(op.features_last(y)))
    return y if x.dim() == batched.dim() else y.squeeze(0)
