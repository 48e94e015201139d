"""Quantized twins of the linear layers: torch's (out, in) and the (in, out) `Conv1D` of transformers' GPT-2."""

from abc import ABC
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlightning.layers.contraction import contract
from qlightning.layers.layer import Twin
from qlightning.layers.operation import Operation


class _FeaturesLast(Operation, ABC):
    """What both layouts share: inputs already have their features last."""

    def features_last(self, x: Tensor) -> Tensor:
        return x

    def features_back(self, x: Tensor) -> Tensor:
        return x

    def grad_bias(self, grad: Tensor) -> Tensor:
        return grad.reshape(-1, grad.shape[-1]).sum(0)


class _Linear(_FeaturesLast):
    """y = x W^T + b with W (out, in)."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight

    def unmatrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def grad_input(self, grad: Tensor, x_shape: torch.Size, weight: Tensor) -> Tensor:
        return grad @ weight

    def grad_weight(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


class _TransposedLinear(_FeaturesLast):
    """y = x W + b with W (in, out)."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def unmatrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix.t()

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.t(), bias)

    def grad_input(self, grad: Tensor, x_shape: torch.Size, weight: Tensor) -> Tensor:
        return grad @ weight.t()

    def grad_weight(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1]).t() @ grad.reshape(-1, grad.shape[-1])


_LINEAR, _TRANSPOSED = _Linear(), _TransposedLinear()


class LinearTwin(Twin):
    """`nn.Linear` with quantized weight, input and output: x (..., in) -> (..., out)."""

    places = ("transform", "adapter", "backward", "product")
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        # nn.MultiheadAttention reads its out_proj's weight and never calls it: that one is not a layer of its own.
        read_directly = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and not read_directly

    def weights(self) -> Mapping[str, Tensor]:
        return {"weight": _LINEAR.matrix(self.weight)}

    def laid_out(self, matrix: Tensor) -> Tensor:
        return _LINEAR.unmatrix(matrix, self.weight)

    def features(self) -> int:
        return _LINEAR.matrix(self.weight).shape[1]

    def output_features(self) -> int:
        return _LINEAR.matrix(self.weight).shape[0]

    @staticmethod
    def multiply_adds(module: nn.Module, inputs: Any, output: Any) -> int:
        return _calls(output, _LINEAR, module)

    def forward(self, input: Tensor) -> Tensor:
        return _run(self, _LINEAR, input)


class TransposedLinearTwin(Twin):
    """transformers' `Conv1D` (GPT-2), a linear layer whose weight is (in, out): x (..., in) -> (..., out)."""

    places = ("transform", "adapter", "backward", "product")
    weight: Tensor
    bias: Tensor

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return f"{type(module).__module__}.{type(module).__name__}" == "transformers.pytorch_utils.Conv1D"

    def weights(self) -> Mapping[str, Tensor]:
        return {"weight": _TRANSPOSED.matrix(self.weight)}

    def laid_out(self, matrix: Tensor) -> Tensor:
        return _TRANSPOSED.unmatrix(matrix, self.weight)

    def features(self) -> int:
        return _TRANSPOSED.matrix(self.weight).shape[1]

    def output_features(self) -> int:
        return _TRANSPOSED.matrix(self.weight).shape[0]

    @staticmethod
    def multiply_adds(module: nn.Module, inputs: Any, output: Any) -> int:
        return _calls(output, _TRANSPOSED, module)

    def forward(self, x: Tensor) -> Tensor:
        return _run(self, _TRANSPOSED, x)


def _run(layer: LinearTwin | TransposedLinearTwin, op: Operation, x: Tensor) -> Tensor:
    quantizers = layer.quantizer("input"), layer.quantizer("weight")
    parts: dict[str, Any] = {"inside": layer.inside(), "backward": layer.backward_part(), "on_codes": layer.on_codes()}
    y = contract(op, layer.transformed(x), layer.weight, layer.bias, *quantizers, **parts)
    output = layer.quantizer("output")
    return y if output is None else output(y)


def _calls(output: Tensor, op: Operation, module: nn.Module) -> int:
    assert isinstance(module.weight, Tensor)
    return output.numel() * op.matrix(module.weight).shape[1]
