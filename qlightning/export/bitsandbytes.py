"""bitsandbytes: `Linear4bit` with NF4 or FP4 weights from our codes, for transformers and for any module.

Stored beside the name of a linear layer of O outputs and I inputs, with blocks of b along the flattened weight:

| tensor | what |
| --- | --- |
| `weight` | uint8 (O I / 2, 1), the first of two codes in the high bits |
| `weight.absmax` | float32 (O I / b) |
| `weight.quant_map` | float32 (16), the values of the codes |
| `weight.quant_state.bitsandbytes__nf4` | block size, shape and dtype as JSON in uint8 |
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlightning.export import pretrained
from qlightning.export.artifact import Shards, read_tensors
from qlightning.export.plain import rounded
from qlightning.export.target import EXACT, TRANSFORM, Plan, Target, Tolerance
from qlightning.export.trained import Layer, Trained, Weight
from qlightning.layers.convert import restore
from qlightning.numerics.codebooks import NF4, Levels
from qlightning.numerics.granularity import PerChannel, PerGroup

_FP4_BY_CODE = tuple(v / 12 for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
FP4 = tuple(sorted({*_FP4_BY_CODE, *(-v for v in _FP4_BY_CODE if v)}))
"""The 15 values of bitsandbytes' FP4, ascending: `Quantizer(Levels(FP4), PerGroup(64))` trains on them."""

_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class BitsAndBytes(Target):
    """`Linear4bit` layers: a model folder that `from_pretrained` reads, or a folder that `load` puts into any module.

    Args:
        shard_bytes: Size beyond which a second file is begun.
    """

    name = "bitsandbytes"
    takes_adapters = True

    def __init__(self, *, shard_bytes: int = 5 * 10**9) -> None:
        self.shard_bytes = shard_bytes

    def refuses(self, trained: Trained, dtype: torch.dtype) -> str | None:
        if pretrained.is_diffusers(trained):
            return "diffusers models are not tried here; format 'plain' is read by all"
        return None

    def misfit(self, weight: Weight, dtype: torch.dtype) -> str | None:
        if not isinstance(weight.layer, nn.Linear):
            return "only linear layers are Linear4bit"
        if not weight.has_codes or _kind(weight) is None:
            return (
                f"its formats are NF4 and FP4 (Levels(FP4) of qlightning.export.bitsandbytes), not {weight.quantizer!r}"
            )
        if _block(weight) not in _SIZES:
            sizes = ", ".join(map(str, _SIZES))
            return f"its blocks are of {sizes} values along a row, not as {weight.quantizer.granularity!r} has them"
        return None

    def misplaced(self, layer: Layer, placement: str, dtype: torch.dtype) -> str | None:
        if placement == TRANSFORM:
            return "Linear4bit takes its input as it is"
        return "Linear4bit computes with float activations"

    def write(self, plan: Plan, folder: Path) -> None:
        names = pretrained.Names(plan.trained, untie=plan.untied)
        shards = Shards(folder, stem=names.stem, shard_bytes=self.shard_bytes)
        for weight in plan.packed():
            for suffix, tensor in _tensors(weight, plan.dtype):
                shards.add(names.of(weight.name) + suffix, tensor)
        for name, tensor in plan.dense():
            names.add(shards, name, lambda tensor=tensor: tensor)  # type: ignore[misc]
        shards.close()
        quantization = _quantization_config(plan) if pretrained.is_transformers(plan.trained) else None
        pretrained.write_config(plan.trained, folder, dtype=plan.dtype, quantization=quantization, untie=plan.untied)

    def load(self, folder: Path, trained: Trained) -> Callable[..., Any]:
        if pretrained.is_transformers(trained):
            return pretrained.load(folder, trained)
        return load(folder, restore(copy.deepcopy(trained.model))).eval()

    def tolerance(self, plan: Plan) -> Tolerance:
        from bitsandbytes.functional import has_avx512bf16

        if plan.dtype != plan.trained.dtype:
            return rounded(plan)
        if has_avx512bf16():
            return Tolerance(None, 20.0, 30.0, "its kernel for this processor computes in bfloat16")
        if plan.adapters and plan.dtype != torch.float32:
            return Tolerance(None, 30.0, 45.0, "PEFT rounds what an adapter adds to a Linear4bit before it is added")
        return EXACT


def load(folder: str | Path, module: nn.Module) -> nn.Module:
    """Put an artifact into a plain module, in place: its packed linear layers become `Linear4bit`.

    Args:
        folder: The artifact.
        module: A module of the class that was trained.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    tensors = dict(read_tensors(Path(folder)))
    packed = [name for name in tensors if f"{name}.absmax" in tensors]
    parts = {name for name in tensors for weight in packed if name == weight or name.startswith(f"{weight}.")}
    rest = {name: tensor for name, tensor in tensors.items() if name not in parts}
    for name in packed:
        path = name.removesuffix(".weight")
        plain = module.get_submodule(path)
        assert isinstance(plain, nn.Linear)
        stats = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        has_bias = plain.bias is not None
        linear = Linear4bit(plain.in_features, plain.out_features, has_bias, compute_dtype=plain.weight.dtype)
        linear.weight = Params4bit.from_prequantized(
            data=tensors[name], quantized_stats=stats, requires_grad=False, device="cpu", module=linear
        )
        if has_bias:
            linear.bias = nn.Parameter(rest.pop(f"{path}.bias"), requires_grad=False)
        module.set_submodule(path, linear)
    missing, unexpected = module.load_state_dict(rest, strict=False)
    known = tuple(name.removesuffix("weight") for name in packed)
    if unexpected or any(not name.startswith(known) for name in missing):
        raise ValueError(f"{folder} does not hold this module: missing {missing}, unexpected {unexpected}")
    return module


def _kind(weight: Weight) -> str | None:
    """bitsandbytes' name of the format, or None."""
    return {Levels(NF4).table: "nf4", Levels(FP4).table: "fp4"}.get(getattr(weight.quantizer.format, "table", ()))


def _block(weight: Weight) -> int:
    granularity = weight.quantizer.granularity
    if isinstance(granularity, PerGroup):
        return granularity.size
    return weight.parameter.shape[1] if isinstance(granularity, PerChannel) else 0


def _tensors(weight: Weight, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    from bitsandbytes.functional import QuantState, get_4bit_type

    stored, kind = weight.quantize(), _kind(weight)
    codes = stored.codes.flatten()
    if kind == "fp4":
        codes = torch.tensor([_fp4_code(value) for value in FP4], dtype=torch.uint8)[codes.long()]
    yield "", ((codes[0::2] << 4) | codes[1::2]).view(-1, 1)
    block = _block(weight)
    state = QuantState(
        absmax=stored.scale.float().flatten(),
        shape=weight.parameter.shape,
        code=get_4bit_type(kind, device="cpu", blocksize=block),
        blocksize=block,
        quant_type=kind,
        dtype=dtype,
    )
    for name, tensor in state.as_dict(packed=True).items():
        yield f".{name}", tensor


def _fp4_code(value: float) -> int:
    """A sign bit above the three bits of the magnitude."""
    return _FP4_BY_CODE.index(abs(value)) + (8 if value < 0 else 0)


def _quantization_config(plan: Plan) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    packed = {weight.name.removesuffix(".weight"): _kind(weight) for weight in plan.packed()}
    linear = (name for name, module in plan.trained.model.named_modules() if isinstance(module, nn.Linear))
    described: dict[str, Any] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=next(iter(packed.values()), "nf4"),
        bnb_4bit_compute_dtype=plan.dtype,
        llm_int8_skip_modules=[name for name in linear if name not in packed],
    ).to_dict()
    return described
