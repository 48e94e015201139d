"""GGUF: one file for llama.cpp, of Llama, Mistral and Qwen models, from our codes.

| type | block | what is stored of a block | trained with |
| --- | --- | --- | --- |
| Q4_0 | 32 | float16 step, codes + 8 | symmetric integers of at most 4 bits: gguf-q4_0, int4-g32-sfp16 |
| Q4_1 | 32 | float16 step and minimum, codes from 0 | integers of at most 4 bits with a zero point: gguf-q4_1 |
| Q8_0 | 32 | float16 step, codes | symmetric integers of 5 to 8 bits: gguf-q8_0, int8-sfp16 |
| TQ1_0, TQ2_0 | 256 | codes + 1 in base 3 or two bits, float16 step | ternary and binary: gguf-tq2_0, ternary-sfp16 |
| MXFP4 | 32 | E8M0 step, E2M1 codes | mxfp4 |

A scale of a larger group, a row or a matrix is written into each of its blocks. Ternary rows that are no multiple of
256 are Q4_0, as llama.cpp has them. What is a vector is float32, which llama.cpp expects; other float matrices,
embedding and head among them, have the artifact's dtype. A BPE tokenizer goes into the file; without one llama.cpp
reads a model of ids ("no_vocab").
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qlightning.export import pretrained
from qlightning.export.gguf_architecture import (
    Architecture,
    architecture,
    ordered,
    reading_options,
    rope_factors,
    write_metadata,
)
from qlightning.export.gguf_tokenizer import write_tokenizer
from qlightning.export.llama_cpp import ACTIVATIONS, LlamaCpp, quantizes_so
from qlightning.export.plain import rounded
from qlightning.export.target import EXACT, TRANSFORM, Plan, Target, Tolerance
from qlightning.export.trained import Layer, Trained, Weight
from qlightning.numerics.floats import Float
from qlightning.numerics.granularity import PerChannel, PerGroup, PerTensor
from qlightning.numerics.microscaling import PowerOfTwo
from qlightning.numerics.quantizer import Quantized

FILE = "model.gguf"

_BLOCKS = {"Q4_0": 32, "Q4_1": 32, "Q8_0": 32, "TQ1_0": 256, "TQ2_0": 256, "MXFP4": 32}
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FILE_TYPES = {
    **{"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "MXFP4": "MOSTLY_MXFP4_MOE"},
    **{kind: f"MOSTLY_{kind}" for kind in ("Q4_0", "Q4_1", "Q8_0", "TQ1_0", "TQ2_0")},
}


class GGUF(Target):
    """A file `model.gguf` for llama.cpp, proven in transformers with the gguf package's own dequantizer.

    llama.cpp rounds the inputs of packed layers to 8 bits, which transformers does not. A model that is trained with
    just that, `input="gguf-q8_0"`, is proven in llama.cpp.

    Args:
        ternary: The type of ternary weights: two bits each (faster) or 1.69 (smaller).
        runtime: Where the file is proven: "transformers", bit for bit, or "llama.cpp", which needs its Python binding.
        pre: llama.cpp's name of how the tokenizer splits text before it merges bytes, "tekken" for example; Llama 3's,
            Qwen's and GPT-2's are known by themselves.
    """

    name = "gguf"

    def __init__(
        self,
        *,
        ternary: Literal["tq2_0", "tq1_0"] = "tq2_0",
        pre: str | None = None,
        runtime: Literal["transformers", "llama.cpp"] = "transformers",
    ) -> None:
        if runtime not in ("transformers", "llama.cpp"):
            raise ValueError(f"GGUF(runtime={runtime!r}): write 'transformers' or 'llama.cpp'")
        if ternary not in ("tq2_0", "tq1_0"):
            raise ValueError(f"GGUF(ternary={ternary!r}): write 'tq2_0' or 'tq1_0'")
        self.ternary, self.pre, self.runtime = ternary, pre, runtime

    def refuses(self, trained: Trained, dtype: torch.dtype) -> str | None:
        found = architecture(trained.model)
        if isinstance(found, str):
            return found
        if dtype not in _DTYPES:
            return f"float tensors are float32, float16 or bfloat16 there, not {dtype}"
        return None

    def misfit(self, weight: Weight, dtype: torch.dtype) -> str | None:
        found = _kind(weight, self.ternary)
        return None if found in _BLOCKS else found

    def misplaced(self, layer: Layer, placement: str, dtype: torch.dtype) -> str | None:
        if placement == TRANSFORM:
            return "llama.cpp's graph of an architecture is fixed"
        if placement != "input" or not layer.weights:
            return "a GGUF file says nothing about activations"
        if not quantizes_so(layer.activations["input"][0], _kind(layer.weights[0], self.ternary)):
            return (
                f"llama.cpp quantizes inputs in its own way: train with input={ACTIVATIONS!r} and 'gguf-q4_0' weights"
            )
        if self.runtime != "llama.cpp":
            return "transformers does not do what llama.cpp does with inputs: prove it with options runtime='llama.cpp'"
        return None

    def write(self, plan: Plan, folder: Path) -> None:
        from gguf import GGMLQuantizationType, GGUFWriter

        entries = list(_entries(plan, self.ternary))
        with closing(GGUFWriter(folder / FILE, _architecture(plan).name)) as writer:
            _write_metadata(writer, plan, Counter(entry.kind for entry in entries if len(entry.shape) > 1))
            _write_tokens(writer, plan, self.pre)
            for entry in entries:
                kind = GGMLQuantizationType[entry.kind]
                shape = _shape_in_bytes(entry.shape, entry.kind)
                writer.add_tensor_info(entry.name, shape, _uint8(), torch.Size(shape).numel(), raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry in entries:
                writer.write_tensor_data(entry.make().contiguous().numpy())

    def load(self, folder: Path, trained: Trained) -> Callable[..., Any]:
        from gguf import GGUFReader

        if self.runtime == "llama.cpp":
            return LlamaCpp(folder / FILE)
        dtype = GGUFReader(folder / FILE).fields["qlightning.dtype"].contents()
        told = reading_options(trained.config)
        return pretrained.load(folder, trained, gguf_file=FILE, dtype=getattr(torch, dtype), **told)

    def tolerance(self, plan: Plan) -> Tolerance:
        if self.runtime == "llama.cpp":
            layers = [layer for layer in plan.trained.layers if layer.weights]
            same = all("input" in layer.activations for layer in layers) and "input" not in plan.dropped
            if same and plan.trained.dtype == torch.float32:
                return Tolerance(None, 45.0, None, "it sums in another order, so that an input may get the next code")
            return Tolerance(None, 20.0, None, "it rounds inputs to 8 bits and computes in float32")
        return EXACT if plan.dtype == plan.trained.dtype else rounded(plan)


# --- which type a weight is ---


def _kind(weight: Weight, ternary: str) -> str:
    """ggml's type of a weight, or why it has none and which spec would."""
    if not weight.has_codes:
        return "it is not one grid of codes and scales: train with 'gguf-q4_0' or 'gguf-q8_0'"
    if weight.parameter.dim() != 2 or not weight.matrix_is_parameter:
        return "only matrices are packed: give this layer no scheme"
    format, granularity, columns = weight.quantizer.format, weight.quantizer.granularity, weight.parameter.shape[1]
    if columns % 32:
        return f"its rows of {columns} values are no blocks of 32: give this layer no scheme"
    if format == Float(2, 1):
        fits = isinstance(weight.quantizer.scale, PowerOfTwo) and granularity == PerGroup(32)
        return (
            "MXFP4" if fits else "its 4-bit floats have groups of 32 with scales that are powers of two: write 'mxfp4'"
        )
    bits = weight.integer_bits
    if bits is None or bits > 8:
        return f"{format!r} is no integer of at most 8 bits: train with 'gguf-q4_0', 'gguf-q8_0' or 'mxfp4'"
    spec = "gguf-q4_0" if bits <= 4 else "gguf-q8_0"
    group = _group(granularity, columns)
    if group % 32:
        return f"scales are of 32 values in a row (or multiples), not {granularity!r}: train with {spec!r}"
    if not format.symmetric:
        if bits > 4 or weight.quantizer.scale.real_zero:
            return f"zero points are integers of at most 4 bits there: train with 'gguf-q4_1', or with {spec!r}"
        return _unless_rounded(weight, "Q4_1", "gguf-q4_1")
    if set(format.values()) <= {-1.0, 0.0, 1.0} and columns % 256 == 0 and group % 256 == 0:
        return _unless_rounded(weight, ternary.upper(), "ternary-sfp16")
    return _unless_rounded(weight, "Q4_0" if bits <= 4 else "Q8_0", spec)


def _group(granularity: Any, columns: int) -> int:
    """How many values in a row share a scale; 1 where it is no whole part of a row."""
    if isinstance(granularity, PerGroup):
        return granularity.size
    return columns if isinstance(granularity, PerChannel | PerTensor) else 1


def _unless_rounded(weight: Weight, kind: str, spec: str) -> str:
    """The type, if float16 holds the scales (and minima) as they are; else why not."""
    if weight.scale_dtype == torch.float16 and kind != "Q4_1":
        return kind
    stored = weight.quantize()
    numbers = stored.scale.double()
    if stored.zero_point is not None:
        numbers = torch.cat([numbers, _minimum(weight, stored)])
    if torch.equal(numbers.half().double(), numbers):
        return kind
    if kind == "Q4_1":
        return f"scales and minima are float16 there, and its own would be rounded: train with {spec!r}"
    dtype = str(weight.scale_dtype).removeprefix("torch.")
    return f"scales are float16 there, and its {dtype} ones would be rounded: train with {spec!r}, or add 'sfp16'"


def _minimum(weight: Weight, stored: Any) -> Tensor:
    """What the lowest code means, float64 of the scale's shape."""
    minimum: Tensor = stored.scale.double() * (weight.quantizer.format.low - stored.zero_point.double())
    return minimum


# --- bytes ---


def _packed(weight: Weight, kind: str) -> Tensor:
    """A weight's codes and scales as ggml's blocks, uint8 (rows, bytes)."""
    on_device, (rows, columns) = weight.quantize(), weight.parameter.shape
    stored = Quantized(*(part if part is None else part.cpu() for part in on_device))  # type: ignore[arg-type]
    block = _BLOCKS[kind]
    steps = _by_block(weight, stored.scale, columns // block)
    if kind == "MXFP4":
        return torch.cat([_bytes(steps), _nibbles(stored.codes.view(rows, -1, block))], -1).view(rows, -1)
    codes = weight.integers(stored.codes).view(rows, -1, block)
    step = _bytes(steps.half())
    if kind == "Q8_0":
        parts = [step, codes.view(torch.uint8)]
    elif kind == "TQ2_0":
        parts = [_two_bits(codes), step]
    elif kind == "TQ1_0":
        parts = [_base_three(codes), step]
    elif kind == "Q4_1":
        minimum = _by_block(weight, _minimum(weight, stored), columns // block).half()
        parts = [step, _bytes(minimum), _nibbles(codes - int(weight.quantizer.format.low))]
    else:
        parts = [step, _nibbles(codes + 8)]
    return torch.cat(parts, -1).view(rows, -1)


def _by_block(weight: Weight, scale: Tensor, blocks: int) -> Tensor:
    """Scales as (rows, blocks, 1), those of larger groups repeated."""
    groups = weight.by_group(scale)
    return groups.repeat_interleave(blocks // groups.shape[1], 1).unsqueeze(-1)


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.uint8)


def _nibbles(codes: Tensor) -> Tensor:
    """Codes 0..15 of a block: the first half in the low bits, the second in the high ones."""
    low, high = codes.to(torch.uint8).chunk(2, -1)
    return low | (high << 4)


def _two_bits(codes: Tensor) -> Tensor:
    """Ternary codes (rows, n, 256): byte j of each half has the elements j, 32 + j, 64 + j and 96 + j of that half."""
    quarters = (codes + 1).to(torch.uint8).unflatten(-1, (2, 4, 32))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)
    return (quarters << shifts).sum(-2, dtype=torch.uint8).flatten(-2)


def _base_three(codes: Tensor) -> Tensor:
    """Ternary codes (rows, n, 256) as 32 and 16 bytes of 5 and 4 bytes of 4, each a fraction of 243 in 256ths."""
    digits = (codes + 1).to(torch.int32)
    powers = torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32).view(5, 1)
    parts = [
        (digits[..., begin : begin + size * count].unflatten(-1, (count, size)) * powers[:count]).sum(-2)
        for begin, size, count in ((0, 32, 5), (160, 16, 5), (240, 4, 4))
    ]
    return ((torch.cat(parts, -1) * 256 + 242) // 243).to(torch.uint8)


# --- the file ---


class Entry(NamedTuple):
    """A tensor of the file: its name, ggml's type, its shape in values, and what makes its bytes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def _entries(plan: Plan, ternary: str) -> Iterator[Entry]:
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = pretrained.Names(plan.trained, untie=plan.untied)
    kind_of_model = MODEL_ARCH[_architecture(plan).name.upper()]
    known = get_tensor_name_map(kind_of_model, plan.trained.config.num_hidden_layers)
    if (factors := rope_factors(plan.trained.model)) is not None:
        yield Entry("rope_freqs.weight", "F32", tuple(factors.shape), lambda: _bytes(factors))
    for weight in plan.packed():
        if names.written(weight.name):
            kind, rows = _kind(weight, ternary), ordered(plan.trained.model, weight.name)
            name, shape = _named(known, weight.name), tuple(weight.parameter.shape)
            yield Entry(name, kind, shape, lambda w=weight, k=kind, r=rows: r(_packed(w, k)))  # type: ignore[misc]
    in_float = {weight.name: weight for weight in plan.trained.weights if weight.name in plan.in_float}
    for key, weight in in_float.items():
        if names.written(key):
            make = lambda w=weight: w.values(plan.dtype)  # noqa: E731
            yield _dense(plan, known, key, weight.parameter.shape, make)
    for key, tensor in plan.trained.floats():
        if names.written(key) and key not in in_float:
            yield _dense(plan, known, key, tensor.shape, lambda t=tensor: t)  # type: ignore[misc]


def _architecture(plan: Plan) -> Architecture:
    found = architecture(plan.trained.model)
    assert isinstance(found, Architecture)
    return found


def _dense(plan: Plan, known: Any, key: str, shape: torch.Size, make: Callable[[], Tensor]) -> Entry:
    dtype, rows = torch.float32 if len(shape) == 1 else plan.dtype, ordered(plan.trained.model, key)
    return Entry(
        _named(known, key), _DTYPES[dtype], tuple(shape), lambda: rows(_bytes(make().to(plan.dtype).to(dtype).cpu()))
    )


def _named(known: Any, key: str) -> str:
    name = known.get_name(key, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise ValueError(f"llama.cpp has no name for {key}: write format='plain'")
    return str(name)


def _shape_in_bytes(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    return tuple(quant_shape_to_byte_shape(shape, GGMLQuantizationType[kind]))


def _uint8() -> Any:
    import numpy as np

    return np.dtype(np.uint8)


def _write_metadata(writer: Any, plan: Plan, kinds: Counter[str]) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    packed = Counter({kind: count for kind, count in kinds.items() if kind in _BLOCKS})
    main = (packed or kinds).most_common(1)[0][0]
    write_metadata(writer, plan.trained.config)
    writer.add_file_type(LlamaFileType[_FILE_TYPES[main]])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_string("qlightning.dtype", str(plan.dtype).removeprefix("torch."))


def _write_tokens(writer: Any, plan: Plan, pre: str | None) -> None:
    config = plan.trained.config
    if plan.tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    ids = {name: getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    one = {name: ends[0] if isinstance(ends, list) else ends for name, ends in ids.items()}
    write_tokenizer(writer, plan.tokenizer, size=config.vocab_size, pre=pre, ids=one)
