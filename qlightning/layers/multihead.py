"""Quantized twins of torch's own transformer: `nn.MultiheadAttention` and the encoder around it.

In eval without gradients torch replaces an encoder layer by one fused kernel that reads all its weights directly and so
would go past their quantizers without a word. The twins of the encoder say that this kernel does not fit them.
"""

from abc import ABC
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qlightning.layers.layer import Twin, plain_class
from qlightning.layers.stand_in import AS_IT_IS, StandIn, stand_ins, with_stand_ins
from qlightning.numerics.tensor_quantizer import TensorQuantizer

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class MultiheadTwin(Twin):
    """`nn.MultiheadAttention` with quantized projections and their input: query, key, value (..., tokens, features).

    `input` quantizes query, key and value with one quantizer; the heads' output, which enters the output projection,
    stays in float. `output` quantizes what the layer returns.
    """

    whole = True
    out_proj: nn.Linear

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        kind = type(module.out_proj)
        if kind is not nn.modules.linear.NonDynamicallyQuantizableLinear:
            return f"its output projection was replaced by a {kind.__name__}, whose weight it cannot read"
        return None if _projections(module) else "its projections are parametrized"

    @property
    def out_proj_weight(self) -> Tensor:
        return self.out_proj.weight

    def weights(self) -> Mapping[str, Tensor]:
        return {**_projections(self), "out_proj_weight": self.out_proj_weight}

    def features(self) -> int:
        return next(iter(_projections(self).values())).shape[1]

    def output_features(self) -> int:
        return self.out_proj_weight.shape[0]

    @staticmethod
    def multiply_adds(module: nn.Module, inputs: Any, output: Any) -> int:
        assert isinstance(module, nn.MultiheadAttention)
        called_by_position = inputs[:3] if len(inputs) > 2 else output[:1] * 3  # else as for self-attention
        query, key, value = (x.numel() // x.shape[-1] for x in called_by_position)
        embed, keys, values = module.embed_dim, module.kdim, module.vdim
        return embed * (query * 2 * embed + key * keys + value * values)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        places = stand_ins(self, _PROJECTIONS, AS_IT_IS)
        if (out := self.quantizer("out_proj_weight")) is not None:
            places.append(StandIn(self.out_proj, "weight", out, AS_IT_IS))
        inputs = _each_once(self.quantizer("input"), query, key, value)
        y, *rest = with_stand_ins(places, lambda: plain_class(self).forward(self, *inputs, *args, **kwargs))
        output = self.quantizer("output")
        return (y if output is None else output(y), *rest)


def _projections(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name in _PROJECTIONS if (p := module._parameters.get(name)) is not None}


def _each_once(quantizer: TensorQuantizer | None, *inputs: Tensor) -> list[Tensor]:
    """Quantized inputs; what was one tensor stays one, since self-attention is recognised by that."""
    if quantizer is None:
        return list(inputs)
    done: dict[int, Tensor] = {}
    for x in inputs:
        if id(x) not in done:
            done[id(x)] = quantizer(x)
    return [done[id(x)] for x in inputs]


class _Around(Twin, ABC):
    """A module that has no quantizers and runs its plain forward."""

    placements = {}

    def weights(self) -> Mapping[str, Tensor]:
        return {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return plain_class(self).forward(self, *args, **kwargs)


class EncoderLayerTwin(_Around):
    """`nn.TransformerEncoderLayer` whose fused inference kernel is off."""

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.TransformerEncoderLayer)

    @property
    def activation_relu_or_gelu(self) -> int:
        return 0  # "neither": the fused kernel has only these two


class EncoderTwin(_Around):
    """`nn.TransformerEncoder` that packs no padded input into nested tensors: only the fused kernel takes them."""

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.TransformerEncoder)

    @property
    def use_nested_tensor(self) -> bool:
        return False
