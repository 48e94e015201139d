"""What compressed-tensors quantizes at run time: inputs of linear layers, keys and values before they are cached."""

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qlightning.export.target import Plan
from qlightning.export.trained import Layer, Trained
from qlightning.layers.layer import plain_class
from qlightning.numerics.floats import Float
from qlightning.numerics.formats import Int
from qlightning.numerics.granularity import PerTensor, PerToken
from qlightning.numerics.scales import AbsMax, MinMax

_E4M3 = Float(4, 3)

# --- inputs ---


def input_args(layer: Layer) -> dict[str, Any] | str:
    """`QuantizationArgs` of a layer's input, or why it has none."""
    (quantizer,) = layer.activations["input"]
    granularity, scale, kind = quantizer.granularity, quantizer.scale, _kind(quantizer)
    if kind is None:
        return f"inputs are int8 or fp8e4m3 there, not {quantizer.format!r}"
    if scale.static and isinstance(granularity, PerTensor):
        return {**kind, "strategy": "tensor", "dynamic": False}
    if not scale.static and isinstance(granularity, PerToken) and scale in (AbsMax(), MinMax()):
        return {**kind, "strategy": "token", "dynamic": True}
    return f"inputs have an absmax scale per token or a fixed one per tensor there, not {quantizer!r}"


def input_tensors(layer: Layer, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(suffix, tensor) of a layer's input with a fixed scale."""
    (quantizer,) = layer.activations["input"]
    stored = quantizer.quantize(torch.zeros(1, layer.weights[0].parameter.shape[1], dtype=dtype))
    yield "input_scale", stored.scale.reshape(1)
    if stored.zero_point is not None:
        yield "input_zero_point", stored.zero_point.reshape(1)


def _kind(quantizer: Any) -> dict[str, Any] | None:
    format = quantizer.format
    kind = {"num_bits": 8, "symmetric": format.symmetric}
    if format == Int(8, symmetric=format.symmetric):
        return {**kind, "type": "int"}
    return {**kind, "type": "float"} if format == _E4M3 else None


# --- keys and values ---


def cache_args(layer: Layer) -> dict[str, Any] | str:
    """`QuantizationArgs` of an attention module's keys and values, or why they have none."""
    quantizers = layer.activations["kv_cache"]
    for quantizer in quantizers:
        kind = _kind(quantizer)
        fixed = quantizer.scale.static and isinstance(quantizer.granularity, PerTensor)
        if kind is None or not kind["symmetric"] or not fixed:
            return (
                "keys and values are symmetric int8 or fp8e4m3 with one fixed scale there, "
                f"kv_cache='fp8e4m3-tensor-lsq', not {quantizer!r}"
            )
    if len(quantizers) != 2 or quantizers[0].format != quantizers[1].format:
        return f"keys and values have one format there, not {[repr(quantizer.format) for quantizer in quantizers]}"
    return {**(_kind(quantizers[0]) or {}), "strategy": "tensor", "dynamic": False}


def one_cache(trained: Trained) -> str | None:
    """Why the caches cannot be described, all those that fit by themselves being one scheme, or None."""
    fitting = [layer for layer in trained.layers if "kv_cache" in layer.activations]
    kinds = {json.dumps(args) for layer in fitting if isinstance(args := cache_args(layer), dict)}
    attention = tuple({plain_class(layer.twin) for layer in fitting})
    modules = sum(isinstance(module, attention) for module in trained.model.modules())
    if kinds and (len(kinds) > 1 or len(fitting) != modules):
        return (
            f"the caches of all attention modules have one scheme there, but {len(fitting)} of {modules} have "
            f"{len(kinds)}: train with one kv_cache= for all, or for none"
        )
    return None


def cached(plan: Plan) -> Iterator[Layer]:
    """The attention modules whose cache is quantized in the artifact."""
    if "kv_cache" not in plan.dropped:
        yield from (layer for layer in plan.trained.layers if "kv_cache" in layer.activations)


def cache_tensors(layer: Layer) -> Iterator[tuple[str, Tensor]]:
    """(suffix, tensor) of an attention module's scales."""
    for name, quantizer in zip(("k_scale", "v_scale"), layer.activations["kv_cache"], strict=True):
        yield name, quantizer.quantize(torch.zeros(1, 1)).scale.reshape(1)
