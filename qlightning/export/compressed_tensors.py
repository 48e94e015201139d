"""compressed-tensors: the format of vLLM, read by `AutoModelForCausalLM.from_pretrained` as well.

What is stored beside the name of a linear layer (O outputs, I inputs, g per group, b bits):

| format | tensors |
| --- | --- |
| pack-quantized | `weight_packed` int32 (O, I b / 32), `weight_scale` (O, I / g), `weight_shape` |
| int-quantized | `weight` int8 (O, I), `weight_scale` (O, 1) |
| float-quantized | `weight` float8_e4m3fn (O, I), `weight_scale` (O, 1) or one per block |
| nvfp4-pack-quantized | `weight_packed` uint8 (O, I / 2), `weight_scale` float8_e4m3fn, `weight_global_scale` float32 |
| mxfp4-pack-quantized | `weight_packed` uint8 (O, I / 2), `weight_scale` uint8 (O, I / 32): the exponent + 127 |

Inputs with a fixed scale have `input_scale`, attention modules `k_scale` and `v_scale` of what goes into their cache.
Zero points are `weight_zero_point`, int8 or packed along the outputs as the weight is along the inputs.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlightning.export import pretrained
from qlightning.export.artifact import Shards
from qlightning.export.compressed_tensors_activations import (
    cache_args,
    cache_tensors,
    cached,
    input_args,
    input_tensors,
    one_cache,
)
from qlightning.export.plain import rounded
from qlightning.export.target import EXACT, TRANSFORM, Plan, Target, Tolerance, other_scales
from qlightning.export.trained import Layer, Trained, Weight
from qlightning.numerics.floats import Float
from qlightning.numerics.granularity import PerBlock, PerChannel, PerGroup, PerTensor
from qlightning.numerics.microscaling import PowerOfTwo, TwoLevel
from qlightning.numerics.packing import pack

_E2M1, _E4M3 = Float(2, 1), Float(4, 3)


class Storage(NamedTuple):
    """How a weight is stored.

    Attributes:
        format: compressed-tensors' name of the layout.
        args: Its `QuantizationArgs`.
        tensors: The tensors by the suffix they have instead of "weight", of an artifact of some dtype.
    """

    format: str
    args: dict[str, Any]
    tensors: Callable[[Weight, torch.dtype], Iterator[tuple[str, Tensor]]]


class CompressedTensors(Target):
    """A transformers model folder with packed linear layers, for vLLM and for transformers.

    transformers decompresses when the model first runs and computes with the dequantized weights, so what was trained
    is computed bit for bit. Scales are stored in the model's dtype: a model that is to be served in bfloat16 is trained
    in bfloat16, or with scales that are rounded to it ("int4-g128-sbf16").

    Packed zero points transformers reads only where the config tells it to dequantize at once, and then only one scheme
    without quantized inputs.

    Args:
        shard_bytes: Size beyond which a second file is begun.
    """

    name = "compressed-tensors"
    takes_adapters = True

    def __init__(self, *, shard_bytes: int = 5 * 10**9) -> None:
        self.shard_bytes = shard_bytes

    def refuses(self, trained: Trained, dtype: torch.dtype) -> str | None:
        if not pretrained.is_transformers(trained):
            return f"{type(trained.model).__name__} is no model of transformers; format 'plain' or 'torchao' takes any"
        packed = {weight.name for weight in trained.weights if self.misfit(weight, dtype) is None}
        if loose := next((name for name in pretrained.Names(trained).taken_apart() if name not in packed), None):
            return (
                f"transformers does not read experts in float ({loose}) beside packed layers: give them a scheme of "
                "symmetric integers, too"
            )
        if reason := one_cache(trained):
            return reason
        packed_zeros = [weight.name for weight in trained.weights if _packs_zeros(weight, dtype)]
        if packed_zeros and not _one_scheme(trained, dtype):
            return (
                f"transformers reads packed zero points ({packed_zeros[0]}) only where all layers have one scheme and "
                "no quantized inputs: train with symmetric integers, or with one scheme for weights alone"
            )
        return None

    def misfit(self, weight: Weight, dtype: torch.dtype) -> str | None:
        if not isinstance(weight.layer, nn.Linear) and not _of_experts(weight):
            return "only linear layers and experts are packed"
        found = _storage(weight, dtype)
        whole = isinstance(found, Storage) and (found.format != "pack-quantized" or not found.args["symmetric"])
        if whole and _of_experts(weight):
            return "experts are packed as symmetric integers alone"
        return found if isinstance(found, str) else None

    def misplaced(self, layer: Layer, placement: str, dtype: torch.dtype) -> str | None:
        if placement == TRANSFORM:
            return "vLLM reads a transform_config, but transformers passes over it, so that nothing could be proven"
        if placement == "kv_cache":
            args = cache_args(layer)
            return args if isinstance(args, str) else None
        if placement != "input":
            return "only inputs of linear layers, keys and values are quantized at run time"
        if not isinstance(layer.twin, nn.Linear) or not layer.weights:
            return "only inputs of linear layers with quantized weights are quantized"
        found = input_args(layer)
        return found if isinstance(found, str) else None

    def write(self, plan: Plan, folder: Path) -> None:
        names = pretrained.Names(plan.trained, untie=plan.untied)
        shards = Shards(folder, stem=names.stem, shard_bytes=self.shard_bytes)
        for weight in plan.packed():
            for name, tensor in _named_tensors(weight, names, plan):
                shards.add(name, tensor)
        for layer in _static_inputs(plan):
            prefix = names.of(layer.weights[0].name).removesuffix("weight")
            for suffix, tensor in input_tensors(layer, plan.trained.dtype):
                shards.add(prefix + suffix, tensor.to(plan.dtype) if tensor.is_floating_point() else tensor)
        for layer in cached(plan):
            for suffix, tensor in cache_tensors(layer):
                shards.add(f"{layer.name}.{suffix}", tensor.to(plan.dtype))
        for name, tensor in plan.dense():
            names.add(shards, name, lambda tensor=tensor: tensor)  # type: ignore[misc]
        shards.close()
        quantization = _quantization_config(plan)
        pretrained.write_config(plan.trained, folder, dtype=plan.dtype, quantization=quantization, untie=plan.untied)

    def load(self, folder: Path, trained: Trained) -> Callable[..., Any]:
        return pretrained.load(folder, trained)

    def tolerance(self, plan: Plan) -> Tolerance:
        if plan.dtype != plan.trained.dtype:
            return rounded(plan)
        kept = {place for layer in plan.trained.layers for place in layer.activations} - set(plan.dropped)
        if kept and plan.dtype != torch.float32:
            return Tolerance(None, 20.0, 30.0, "its emulation divides activations by their scale in the model's dtype")
        return EXACT


# --- weights ---


def _named_tensors(weight: Weight, names: pretrained.Names, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a weight by their names in files; fused experts' are taken apart as their weight would be."""
    dtype, storage = plan.dtype, _storage(weight, plan.dtype, inputs="input" not in plan.dropped)
    assert isinstance(storage, Storage)
    if not _of_experts(weight):
        prefix = names.of(weight.name).removesuffix("weight")
        yield from ((prefix + suffix, tensor) for suffix, tensor in storage.tensors(weight, dtype))
        return
    stored, (experts, rows, _) = weight.quantize(), weight.parameter.shape
    codes = names.in_files({weight.name: weight.integers(stored.codes).view(weight.parameter.shape)})
    scales = names.in_files({weight.name: weight.by_group(stored.scale).to(dtype).view(experts, rows, -1)})
    for name, matrix in codes.items():
        yield from _packed(name.removesuffix("weight"), matrix, scales[name], storage.args["num_bits"])


def _of_experts(weight: Weight) -> bool:
    """Whether it is a fused weight (experts, out, in)."""
    parameter, matrix = weight.parameter, weight.layer.weights()[weight.prefix]
    flattened = parameter.dim() == 3 and matrix.shape == (parameter.shape[0] * parameter.shape[1], parameter.shape[2])
    return flattened and matrix.data_ptr() == parameter.data_ptr()


def _storage(weight: Weight, dtype: torch.dtype, *, inputs: bool = True) -> Storage | str:
    """How a weight is stored, or why it cannot be; `inputs`: whether a quantizer of its layer's input is kept."""
    if not weight.has_codes:
        return "it is not one grid of codes and scales"
    quantizer = weight.quantizer
    format, granularity = quantizer.format, quantizer.granularity
    if format == _E2M1 and isinstance(quantizer.scale, TwoLevel | PowerOfTwo):
        return _four_bit_float(weight, dtype)
    if reason := other_scales(weight, dtype):
        return reason
    if format == _E4M3 and isinstance(granularity, PerChannel | PerTensor | PerBlock):
        args = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, **_strategy(granularity)}
        return Storage("float-quantized", args, _whole_codes)
    bits = weight.integer_bits
    if bits is None or bits > 8:
        return f"{format!r} is neither an integer of at most 8 bits nor one of its floats (fp8e4m3, nvfp4, mxfp4)"
    if not isinstance(granularity, PerGroup | PerChannel | PerTensor):
        return f"integers have scales per group, channel or tensor there, not {granularity!r}"
    if not format.symmetric and quantizer.scale.real_zero:
        return "its zero points are no integers"
    args = {"num_bits": bits, "type": "int", "symmetric": format.symmetric, "dynamic": False, **_strategy(granularity)}
    whole = bits == 8 and inputs and weight.layer.quantizer("input") is not None and args["strategy"] == "channel"
    return Storage("int-quantized", args, _whole_codes) if whole else Storage("pack-quantized", args, _packed_codes)


def _packs_zeros(weight: Weight, dtype: torch.dtype) -> bool:
    storage = _storage(weight, dtype) if isinstance(weight.layer, nn.Linear) else ""
    return isinstance(storage, Storage) and storage.format == "pack-quantized" and not storage.args["symmetric"]


def _one_scheme(trained: Trained, dtype: torch.dtype) -> bool:
    found = [_storage(weight, dtype) for weight in trained.weights if isinstance(weight.layer, nn.Linear)]
    kinds = {json.dumps(storage.args, sort_keys=True) for storage in found if isinstance(storage, Storage)}
    return len(kinds) == 1 and not any("input" in layer.activations for layer in trained.layers)


def _strategy(granularity: Any) -> dict[str, Any]:
    if isinstance(granularity, PerGroup):
        return {"strategy": "group", "group_size": granularity.size}
    if isinstance(granularity, PerBlock):
        return {"strategy": "block", "block_structure": [granularity.rows, granularity.columns]}
    return {"strategy": "channel"}


def _by_block(weight: Weight, scale: Tensor) -> Tensor:
    return scale.squeeze(-1) if isinstance(weight.quantizer.granularity, PerBlock) else weight.by_group(scale)


def _packed_codes(weight: Weight, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    stored, bits = weight.quantize(), weight.integer_bits
    assert bits is not None
    yield from _packed("", weight.integers(stored.codes), _by_block(weight, stored.scale).to(dtype), bits)
    if stored.zero_point is not None:
        zeros = _by_block(weight, stored.zero_point)
        yield "weight_zero_point", _pack_words(zeros.t().contiguous(), bits).t().contiguous()


def _packed(prefix: str, codes: Tensor, scale: Tensor, bits: int) -> Iterator[tuple[str, Tensor]]:
    yield f"{prefix}weight_packed", _pack_words(codes, bits)
    yield f"{prefix}weight_scale", scale.contiguous()
    yield f"{prefix}weight_shape", torch.tensor(codes.shape, dtype=torch.int64)


def _pack_words(values: Tensor, bits: int) -> Tensor:
    """Signed integers (rows, n) as int32 words, low bits first, offset so that the lowest is zero."""

    def words(rows: Tensor) -> Tensor:
        # values + 2^(bits-1) in `bits` bits is the two's complement with its sign bit flipped
        unsigned = rows.to(torch.int16) + 2 ** (bits - 1)
        stream = ((unsigned[..., None] >> torch.arange(bits, dtype=torch.int16)) & 1).to(torch.uint8).flatten(-2)
        return pack(F.pad(stream, (0, -stream.shape[-1] % 32)), 1).contiguous().view(torch.int32)

    return _by_rows(words, values)


def _by_rows(make: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    """`make(matrix)`, some rows at a time: bit by bit a layer would take many times its memory."""
    return torch.cat([make(rows) for rows in matrix.split(max(1, 2**15 // matrix.shape[1]))])


def _whole_codes(weight: Weight, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    stored = weight.quantize()
    codes = (
        stored.codes.view(torch.float8_e4m3fn) if weight.quantizer.format == _E4M3 else weight.integers(stored.codes)
    )
    yield "weight", codes
    yield "weight_scale", _by_block(weight, stored.scale).to(dtype)
    if stored.zero_point is not None:
        yield "weight_zero_point", _by_block(weight, stored.zero_point)


def _four_bit_float(weight: Weight, dtype: torch.dtype) -> Storage | str:
    two_level = isinstance(weight.quantizer.scale, TwoLevel)
    size = 16 if two_level else 32
    if weight.quantizer.granularity != PerGroup(size):
        return f"groups of these 4-bit floats are of {size}, not {weight.quantizer.granularity!r}"
    if dtype != torch.bfloat16:
        return "4-bit floats are computed with in bfloat16 alone: write dtype='bfloat16' (--dtype bfloat16)"
    args: dict[str, Any] = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False, "group_size": size}
    if two_level:
        return Storage("nvfp4-pack-quantized", {**args, "strategy": "tensor_group"}, _nvfp4)
    return Storage("mxfp4-pack-quantized", {**args, "strategy": "group", "scale_dtype": "torch.uint8"}, _mxfp4)


def _nvfp4(weight: Weight, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    stored = weight.quantize()
    assert stored.tensor_scale is not None
    yield "weight_packed", _by_rows(lambda rows: pack(rows, 4), stored.codes)
    yield "weight_scale", stored.scale.squeeze(-1)
    yield "weight_global_scale", stored.tensor_scale.float().reshape(1)


def _mxfp4(weight: Weight, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    stored = weight.quantize()
    yield "weight_packed", _by_rows(lambda rows: pack(rows, 4), stored.codes)
    yield "weight_scale", stored.scale.squeeze(-1).contiguous().view(torch.uint8)


def _static_inputs(plan: Plan) -> Iterator[Layer]:
    for layer in plan.trained.layers:
        inputs = layer.activations.get("input", [])
        if "input" not in plan.dropped and any(quantizer.scale.static for quantizer in inputs):
            yield layer


# --- config.json ---


def _quantization_config(plan: Plan) -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = {}
    in_codes = {weight.name for weight in plan.packed()}
    packed = set()
    for layer in plan.trained.layers:
        if not layer.weights or layer.weights[0].name not in in_codes:
            continue
        packed.add(layer.name)
        storage = _storage(layer.weights[0], plan.dtype, inputs="input" not in plan.dropped)
        assert isinstance(storage, Storage)
        inputs = input_args(layer) if "input" in layer.activations and "input" not in plan.dropped else None
        group = {"weights": storage.args, "input_activations": inputs, "output_activations": None}
        key = json.dumps([storage.format, group], sort_keys=True)
        target = f"re:.*{layer.name.rpartition('.')[2]}.*" if _of_experts(layer.weights[0]) else layer.name
        targets = groups.setdefault(key, {**group, "format": storage.format, "targets": []})["targets"]
        targets += [] if target in targets else [target]
    if len(groups) == 1:
        next(iter(groups.values()))["targets"] = ["Linear"]
    formats = {group["format"] for group in groups.values()}
    linear = (name for name, module in plan.trained.model.named_modules() if isinstance(module, nn.Linear))
    caches = [cache_args(layer) for layer in cached(plan)]  # all the same
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        **({"dequantize": True} if any(_packs_zeros(weight, plan.dtype) for weight in plan.packed()) else {}),
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())},
        "ignore": [name for name in linear if name not in packed],
        **({"kv_cache_scheme": caches[0]} if caches else {}),
    }
