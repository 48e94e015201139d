"""torchao: tensor subclasses in the place of linear weights, for transformers' TorchAoConfig and for any module.

| scheme of a linear layer | tensor | what it computes |
| --- | --- | --- |
| int1 .. int8 weights | `IntxUnpackedToInt8Tensor` | the dequantized weight in the model's dtype |
| the same with int8-token-asym inputs | the same, `int8_asym_per_token` | dequantized inputs and weights |
| int8 weights per channel, int8-token inputs | `Int8Tensor` | integers, scaled afterwards |

Nothing is pickled: torchao's own safetensors layout holds codes, scales and zero points as plain tensors, and the class
of each as JSON in the file's metadata. A code takes a byte, however few bits it has; torchao packs when it lowers.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlightning.export import pretrained
from qlightning.export.artifact import Shards, read_metadata, read_tensors
from qlightning.export.plain import rounded
from qlightning.export.target import EXACT, TRANSFORM, Plan, Target, Tolerance, other_scales
from qlightning.export.trained import Layer, Trained, Weight
from qlightning.layers.convert import restore
from qlightning.numerics.formats import Int
from qlightning.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qlightning.numerics.scales import AbsMax, MinMax


class TorchAO(Target):
    """torchao tensors: a model folder that `from_pretrained` reads, or a state dict (`load_state_dict`) for any module.

    Args:
        shard_bytes: Size beyond which a second file is begun.
    """

    name = "torchao"
    takes_adapters = True

    def __init__(self, *, shard_bytes: int = 5 * 10**9) -> None:
        self.shard_bytes = shard_bytes

    def refuses(self, trained: Trained, dtype: torch.dtype) -> str | None:
        if pretrained.is_diffusers(trained):
            return "diffusers cannot read its safetensors layout back; format 'plain' is read by all"
        return None

    def misfit(self, weight: Weight, dtype: torch.dtype) -> str | None:
        if not isinstance(weight.layer, nn.Linear):
            return "only linear layers hold its tensors"
        quantizer = weight.quantizer
        if weight.integer_bits is None or weight.integer_bits > 8:
            return f"{quantizer!r} is not one grid of integers of at most 8 bits"
        if not isinstance(quantizer.granularity, PerGroup | PerChannel | PerTensor):
            return f"its scales are per group, channel or tensor, not {quantizer.granularity!r}"
        if quantizer.scale.real_zero:
            return "its zero points are no integers"
        return other_scales(weight, dtype)

    def misplaced(self, layer: Layer, placement: str, dtype: torch.dtype) -> str | None:
        if placement == TRANSFORM:
            return "its tensors stand for weights and take the input as it is"
        if placement != "input" or not isinstance(layer.twin, nn.Linear) or not layer.weights:
            return "only inputs of linear layers with quantized weights are quantized"
        (quantizer,), (weight,) = layer.activations["input"], layer.weights
        per_token = isinstance(quantizer.granularity, PerToken) and quantizer.format.bits == 8
        if per_token and quantizer.format == Int(8, symmetric=False) and quantizer.scale == MinMax():
            return None
        if not (per_token and quantizer.format == Int(8) and quantizer.scale == AbsMax()):
            return f"inputs are 'int8-token-asym' there, or 'int8-token' with int8 weights, not {quantizer!r}"
        if weight.quantizer.format != Int(8) or isinstance(weight.quantizer.granularity, PerGroup):
            return "'int8-token' inputs go with int8 weights per channel: others take 'int8-token-asym'"
        return None

    def write(self, plan: Plan, folder: Path) -> None:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        names = pretrained.Names(plan.trained, untie=plan.untied)
        shards = Shards(folder, stem=names.stem, shard_bytes=self.shard_bytes)
        described: dict[str, str] = {}
        for layer, weight in _packed(plan):
            tensors, metadata = flatten_tensor_state_dict({weight.name: _tensor(layer, weight, plan)})
            described[weight.name] = metadata[weight.name]  # by the name in the model, which transformers asks for
            prefix = names.of(weight.name).removesuffix("weight")
            for part, tensor in tensors.items():
                shards.add(prefix + part.rpartition(".")[2], tensor)
        for name, tensor in plan.dense():
            names.add(shards, name, lambda tensor=tensor: tensor)  # type: ignore[misc]
        shards.close({**described, "tensor_names": json.dumps(list(described))})
        pretrained.write_config(
            plan.trained,
            folder,
            dtype=plan.dtype,
            quantization=_quantization_config(plan) if pretrained.is_transformers(plan.trained) else None,
            untie=plan.untied,
        )

    def load(self, folder: Path, trained: Trained) -> Callable[..., Any]:
        if pretrained.is_pretrained(trained):
            return pretrained.load(folder, trained)
        module = restore(copy.deepcopy(trained.model))
        module.load_state_dict(load_state_dict(folder), assign=True)
        return module.eval()

    def tolerance(self, plan: Plan) -> Tolerance:
        if plan.dtype != plan.trained.dtype:
            return rounded(plan)
        if "input" in plan.dropped or not any("input" in layer.activations for layer in plan.trained.layers):
            return EXACT
        # An input that lies between two codes may become the other one, the largest of a symmetric range above all. In
        # bfloat16 the range, too, is taken in that dtype.
        least = 45.0 if plan.dtype == torch.float32 else 30.0
        return Tolerance(None, 20.0, least, "torchao multiplies inputs with the reciprocal of their scale")


def load_state_dict(folder: str | Path) -> dict[str, Tensor]:
    """The state dict of an artifact, with torchao's tensors: `module.load_state_dict(state, assign=True)`.

    Args:
        folder: The artifact.
    """
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    tensors, metadata = dict(read_tensors(Path(folder))), read_metadata(Path(folder))
    packed = {name: tensor for name, tensor in tensors.items() if _belongs(name, metadata)}
    if not packed:
        return tensors
    made, left = unflatten_tensor_state_dict(packed, metadata)
    if left:
        raise ValueError(f"{folder} is no whole torchao artifact: {sorted(left)} belong to no tensor")
    state: dict[str, Tensor] = {name: tensor for name, tensor in tensors.items() if name not in packed}
    return {**state, **made}


def _belongs(name: str, metadata: Mapping[str, str]) -> bool:
    """Whether a tensor of the file is a part of one of torchao's."""
    names = json.loads(metadata.get("tensor_names", "[]"))
    return any(name.startswith("._".join([*known.rsplit(".", 1)]) + "_") for known in names)


def _packed(plan: Plan) -> Iterator[tuple[Layer, Weight]]:
    for layer in plan.trained.layers:
        for weight in layer.weights:
            if weight.name not in plan.in_float:
                yield layer, weight


def _acting_input(layer: Layer, plan: Plan) -> Any:
    """The quantizer of a layer's input, or None."""
    return None if "input" in plan.dropped else next(iter(layer.activations.get("input", [])), None)


def _tensor(layer: Layer, weight: Weight, plan: Plan) -> Tensor:
    """torchao's tensor of our codes."""
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    stored, rows = weight.quantize(), weight.parameter.shape[0]
    codes, input = weight.integers(stored.codes), _acting_input(layer, plan)
    scale, size = weight.by_group(stored.scale).to(plan.dtype), _group(weight)
    zero = (
        torch.zeros_like(scale, dtype=torch.int8) if stored.zero_point is None else weight.by_group(stored.zero_point)
    )
    if input is not None and input.format.symmetric:
        options = QuantizeTensorToInt8Kwargs(granularity=PerRow())
        return Int8Tensor(codes, scale.view(rows, 1), [1, size], plan.dtype, act_quant_kwargs=options)
    return IntxUnpackedToInt8Tensor(
        **{
            "qdata": codes,
            "scale": scale,
            "zero_point": zero,
            "target_dtype": getattr(torch, f"int{weight.integer_bits}"),
        },
        **{"block_size": (1, size), "dtype": plan.dtype},
        activation_quantization=None if input is None else "int8_asym_per_token",
    )


def _group(weight: Weight) -> int:
    """Columns that share a scale."""
    granularity = weight.quantizer.granularity
    return granularity.size if isinstance(granularity, PerGroup) else weight.parameter.shape[1]


def _quantization_config(plan: Plan) -> dict[str, Any]:
    from torchao.quantization import FqnToConfig
    from transformers import TorchAoConfig

    configs = {layer.name: _config(layer, weight, plan) for layer, weight in _packed(plan)}
    kinds = {repr(config) for config in configs.values()}
    linear = (name for name, module in plan.trained.model.named_modules() if isinstance(module, nn.Linear))
    chosen = next(iter(configs.values())) if len(kinds) == 1 else FqnToConfig(configs)
    described: dict[str, Any] = TorchAoConfig(
        chosen, modules_to_not_convert=[name for name in linear if name not in configs]
    ).to_dict()
    return described


def _config(layer: Layer, weight: Weight, plan: Plan) -> Any:
    """What torchao would be told to quantize the layer likewise."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
    )
    from torchao.quantization.granularity import PerAxis
    from torchao.quantization.granularity import PerGroup as Groups

    dtype, input = getattr(torch, f"int{weight.integer_bits}"), _acting_input(layer, plan)
    granularity = Groups(_group(weight)) if isinstance(weight.quantizer.granularity, PerGroup) else PerAxis(0)
    if input is None:
        return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)
    if input.format.symmetric:
        return Int8DynamicActivationInt8WeightConfig()
    return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
