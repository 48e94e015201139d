"""Specs: quantizers as short strings, both ways, and as plain data for checkpoints.

    spec        = format [- part]*
    format      = int1..int16 | uint1..uint8 | fp4e2m1 | fp6e2m3 | fp6e3m2 | fp8e4m3 | fp8e5m2
                | ternary | binary | nf4 | log2..log8 | nvfp4 | mxfp4 | mxfp6e2m3 | mxfp6e3m2 | mxfp8e4m3 | mxfp8e5m2
                | gguf-q4_0 | gguf-q4_1 | gguf-q8_0 | gguf-tq1_0 | gguf-tq2_0 | gguf-mxfp4
    range       = asym | narrow
    granularity = tensor | channel | token | g<n> | b<rows>x<columns>
    scale       = absmax | minmax | absmean | absmedian | p<percent> | mse | ema | learned | lsq
    gradient    = ste | clip        (lsq names both the learned scale and its gradient)
    rounding    = sr                (stochastic)
    scale dtype = sfp32 | sbf16 | sfp16

Parts come in any order after the format; what is left out has the format's default. Everything a string cannot say is
said with parts: `Quantizer(Int(4), PerGroup(128), scale=EMA(decay=0.9))`.
"""

import copy
import difflib
import functools
import importlib
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from qlightning.numerics.codebooks import NF4, Levels, log_levels
from qlightning.numerics.floats import Float
from qlightning.numerics.formats import Binary, Int, Ternary, UInt
from qlightning.numerics.gguf import HalfAway, HalfMinimum, SignedExtreme, StoredHalf
from qlightning.numerics.gradients import LSQ, STE, ClippedSTE
from qlightning.numerics.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from qlightning.numerics.learned import EMA, Learned
from qlightning.numerics.microscaling import PowerOfTwo, TwoLevel
from qlightning.numerics.part import Part
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.rounding import HalfUp, Stochastic
from qlightning.numerics.scales import MSE, AbsMax, AbsMean, AbsMedian, LSQStep, MinMax, Percentile
from qlightning.numerics.tensor_quantizer import TensorQuantizer

Parts = dict[str, Any]
"""Arguments of Quantizer by name, as prototypes: copied before use, since scales and roundings may have state."""

_FLOATS = {f"fp{1 + e + m}e{e}m{m}": Float(e, m) for e, m in ((2, 1), (2, 3), (3, 2), (4, 3), (5, 2))}

_GGUF: Parts = {"granularity": PerGroup(32), "scale_dtype": torch.float16}

_FORMATS: dict[str, Parts] = {
    **{f"int{bits}": {"format": bits, "granularity": PerChannel()} for bits in range(1, 17)},
    **{f"uint{bits}": {"format": UInt(bits), "granularity": PerTensor()} for bits in range(1, 9)},
    **{name: {"format": float_, "granularity": PerChannel()} for name, float_ in _FLOATS.items()},
    "nvfp4": {"format": Float(2, 1), "granularity": PerGroup(16), "scale": TwoLevel()},
    "mxfp4": {"format": Float(2, 1), "granularity": PerGroup(32), "scale": PowerOfTwo()},
    **{
        f"mx{name}": {"format": float_, "granularity": PerGroup(32), "scale": PowerOfTwo()}
        for name, float_ in _FLOATS.items()
        if name != "fp4e2m1"
    },
    "ternary": {"format": Ternary(), "granularity": PerTensor(), "scale": AbsMean()},
    "binary": {"format": Binary(), "granularity": PerChannel(), "scale": AbsMean()},
    "nf4": {"format": Levels(NF4), "granularity": PerGroup(64)},
    **{f"log{bits}": {"format": log_levels(bits), "granularity": PerChannel()} for bits in range(2, 9)},
    "gguf-q4_0": {"format": Int(4), "scale": SignedExtreme(), "rounding": HalfUp(), **_GGUF},
    "gguf-q4_1": {"format": Int(4, symmetric=False), "scale": HalfMinimum(), **_GGUF},
    "gguf-q8_0": {"format": Int(8, range="narrow"), "scale": StoredHalf(), "rounding": HalfAway(), **_GGUF},
}
"""What a format name stands for. The format of an integer is its number of bits until 'asym' and 'narrow' are read."""

_ALIASES = {
    **{name: ["ternary", "g256", "sfp16"] for name in ("gguf-tq1_0", "gguf-tq2_0")},
    "gguf-mxfp4": ["mxfp4"],
}
"""Further names of what other words say, too."""

_PARTS: dict[str, Parts] = {
    "asym": {"asym": True},
    "narrow": {"narrow": True},
    "tensor": {"granularity": PerTensor()},
    "channel": {"granularity": PerChannel()},
    "token": {"granularity": PerToken()},
    "absmax": {"scale": AbsMax()},
    "minmax": {"scale": MinMax()},
    "absmean": {"scale": AbsMean()},
    "absmedian": {"scale": AbsMedian()},
    "mse": {"scale": MSE()},
    "ema": {"scale": EMA()},
    "learned": {"scale": Learned(), "gradient": ClippedSTE()},
    "lsq": {"scale": Learned(LSQStep()), "gradient": LSQ()},
    "ste": {"gradient": STE()},
    "clip": {"gradient": ClippedSTE()},
    "sr": {"rounding": Stochastic()},
    "sfp32": {"scale_dtype": torch.float32},
    "sbf16": {"scale_dtype": torch.bfloat16},
    "sfp16": {"scale_dtype": torch.float16},
}

_PATTERNS: list[tuple[str, Callable[..., Parts], str]] = [
    (r"g([1-9]\d*)", lambda size: {"granularity": PerGroup(int(size))}, "g128"),
    (r"b([1-9]\d*)x([1-9]\d*)", lambda r, c: {"granularity": PerBlock(int(r), int(c))}, "b16x16"),
    (r"p(\d+(?:\.\d+)?)", lambda percent: {"scale": Percentile(float(percent))}, "p99.9"),
]

_WORDS = [*_PARTS, *(example for *_, example in _PATTERNS)]


def parse(spec: str) -> Quantizer:
    """The quantizer a spec names.

    >>> parse("int4-g128")
    Quantizer(Int(4), PerGroup(128))

    Raises:
        ValueError: A word is unknown, said twice, or does not fit the format; the message names the nearest right spec.
    """
    text = spec.strip().lower() if isinstance(spec, str) else ""
    try:
        return _read(_words_of(text))
    except ValueError as error:
        raise ValueError(f"spec {spec!r}: {error}; did you mean {_nearest(text)!r}?") from None


def _words_of(text: str) -> list[str]:
    head, *rest = re.sub("^gguf-", "gguf ", text).split("-")
    head = head.replace(" ", "-")
    return [*_ALIASES.get(head, [head]), *rest]


def _read(words: list[str]) -> Quantizer:
    head, *rest = words
    if head not in _FORMATS:
        raise ValueError(f"unknown format {head!r} (known: {_in_short(list(_FORMATS))})")
    chosen: Parts = {}
    for word in rest:
        for axis, part in _part(word).items():
            if axis in chosen:
                raise ValueError(f"{word!r} says {axis} twice")
            chosen[axis] = part
    return _assemble(head, chosen)


def _in_short(names: list[str]) -> str:
    """
    >>> _in_short(["int1", "int2", "int3", "ternary", "log2"])
    'int1 to int3, ternary, log2'
    """
    runs: list[list[str]] = []
    for name in names:
        stem = name.rstrip("0123456789")
        if runs and stem != name and runs[-1][-1] == f"{stem}{int(name.removeprefix(stem)) - 1}":
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs)


def _part(word: str) -> Parts:
    if word in _PARTS:
        return copy.deepcopy(_PARTS[word])
    for pattern, make, _ in _PATTERNS:
        if match := re.fullmatch(pattern, word):
            return make(*match.groups())
    raise ValueError(f"unknown word {word!r} (known: {', '.join(_WORDS)})")


def _nearest(text: str) -> str:
    """A right spec close by: unknown words become the closest known ones, words that do not fit are left out."""
    kept: list[str] = []
    for word in re.findall(r"gguf-q\d_\d|[a-z0-9.]+", text):
        known = kept and (word in _PARTS or any(re.fullmatch(pattern, word) for pattern, *_ in _PATTERNS))
        closest = word if known else _closest(word, _WORDS if kept else list(_FORMATS))
        longer = [*kept, *closest.split()]
        kept = longer if _attempt(longer) else kept
    return "-".join(kept) or "int4-g128"


def _closest(word: str, known: list[str]) -> str:
    """The known word that is meant, or an empty string."""
    begun = [name for name in known if name.startswith(word)]
    beginning = [name for name in known if word.startswith(name)]
    similar = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return word if word in known else [*begun, *beginning[-1:], *similar, ""][0]


def _attempt(words: list[str]) -> Quantizer | None:
    try:
        return _read(words) if words else None
    except ValueError:
        return None


def _assemble(head: str, chosen: Parts) -> Quantizer:
    parts = copy.deepcopy(_FORMATS[head]) | chosen
    asym, narrow = parts.pop("asym", False), parts.pop("narrow", False)
    if isinstance(parts["format"], int):
        parts["format"] = Int(parts["format"], symmetric=not asym, range="narrow" if narrow else "full")
    elif asym or narrow:
        raise ValueError("'asym' and 'narrow' are for integers, for example 'int8-asym-channel'")
    if asym and parts.get("scale") == AbsMax():
        raise ValueError("'asym' needs a scale with a zero point; leave 'absmax' out")
    if isinstance(parts.get("scale"), Learned) and asym:
        parts["scale"] = Learned()
    return Quantizer(parts.pop("format"), parts.pop("granularity"), **parts)


def unparse(quantizer: TensorQuantizer) -> str | None:
    """The canonical spec of a quantizer, or None when only parts can say it.

    >>> unparse(parse("int8-channel-asym"))
    'int8-asym'
    """
    if not isinstance(quantizer, Quantizer) or quantizer.transform is not None:
        return None
    for head, defaults in _FORMATS.items():
        words = _words(quantizer, defaults)
        if words is not None and _meant(head, *words) == quantizer:
            return "-".join([head, *words])
    return None


@functools.cache
def _meant(*words: str) -> Quantizer | None:
    """What words say, to compare with and not to hand out: each checkpoint asks it of each of its quantizers."""
    return _attempt(list(words))


def _words(quantizer: Quantizer, defaults: Parts) -> list[str] | None:
    words: list[str] = []
    format = defaults["format"]
    if isinstance(format, int):
        if not isinstance(quantizer.format, Int) or quantizer.format.bits != format:
            return None
        words += ["asym"] * (not quantizer.format.symmetric) + ["narrow"] * (quantizer.format.range == "narrow")
    elif format != quantizer.format:
        return None
    if quantizer.granularity != defaults["granularity"]:
        words.append(_granularity_word(quantizer.granularity))
    if (scale := _scale_words(quantizer, defaults)) is None:
        return None
    words += scale
    words += ["sr"] * isinstance(quantizer.rounding, Stochastic)
    shipped = {torch.float32: "sfp32", torch.bfloat16: "sbf16", torch.float16: "sfp16"}
    if quantizer.scale_dtype not in (None, defaults.get("scale_dtype")):
        words.append(shipped[quantizer.scale_dtype])
    return words


def _granularity_word(granularity: Granularity) -> str:
    if isinstance(granularity, PerGroup):
        return f"g{granularity.size}"
    if isinstance(granularity, PerBlock):
        return f"b{granularity.rows}x{granularity.columns}"
    return next((w for w, parts in _PARTS.items() if parts.get("granularity") == granularity), "?")


def _scale_words(quantizer: Quantizer, defaults: Parts) -> list[str] | None:
    plain = Quantizer(quantizer.format, scale=defaults.get("scale"))
    if quantizer.scale == plain.scale and quantizer.gradient == STE():
        return []
    asym = not quantizer.format.symmetric
    for word in ("lsq", "learned"):
        part = _PARTS[word]
        scale = Learned() if asym else part["scale"]
        if quantizer.scale == scale and quantizer.gradient == part["gradient"]:
            return [word]
    words = []
    if quantizer.scale != plain.scale:
        if isinstance(quantizer.scale, Percentile):
            words.append(f"p{quantizer.scale.percent:g}")
        else:
            named = [w for w, parts in _PARTS.items() if parts.get("scale") == quantizer.scale]
            if not named:
                return None
            words.append(named[0])
    if quantizer.gradient != STE():
        if quantizer.gradient != ClippedSTE():
            return None
        words.append("clip")
    return words


# --- plain data: what a checkpoint or a YAML file holds ---

Description = str | dict[str, Any]


def describe(part: Any) -> Any:
    """A quantizer or part as plain data: a spec where one exists, else {"class": ..., "arguments": ...}."""
    if isinstance(part, Quantizer) and (spec := unparse(part)) is not None:
        return spec
    if isinstance(part, Part):
        arguments = {name: _described_argument(value) for name, value in part.arguments().items()}
        return {"class": f"{type(part).__module__}:{type(part).__qualname__}", "arguments": arguments}
    if isinstance(part, torch.dtype):
        return {"dtype": str(part).removeprefix("torch.")}
    return list(part) if isinstance(part, tuple) else part


def _described_argument(value: Any) -> Any:
    """As `describe`; a spec is marked as one, since an argument may be any other string."""
    if isinstance(value, list | tuple):
        return [_described_argument(item) for item in value]
    described = describe(value)
    return {"spec": described} if isinstance(value, Quantizer) and isinstance(described, str) else described


def rebuild(data: Any) -> Any:
    """The inverse of `describe`. Only subclasses of `Part`, ours or of modules already imported, are built.

    Raises:
        ValueError: The data names a class that is unknown here or is not a part.
    """
    if isinstance(data, str):
        return parse(data)
    if isinstance(data, dict) and set(data) == {"class", "arguments"}:
        return _built(_find(str(data["class"])), data["arguments"])
    if isinstance(data, dict) and set(data) == {"spec"}:
        return parse(data["spec"])
    if isinstance(data, dict) and set(data) == {"dtype"}:
        dtype = getattr(torch, str(data["dtype"]), None)
        if isinstance(dtype, torch.dtype):
            return dtype
    raise ValueError(f"not a description of a quantizer: {data!r}; write a spec such as 'int4-g128'")


def _built(cls: type[Part], arguments: Any) -> Part:
    try:
        return cls(**{name: _rebuilt_argument(value) for name, value in arguments.items()})
    except ValueError:
        raise
    except Exception as error:  # whatever arguments of other types than a part ever wrote lead it to
        raise ValueError(f"not a description of a {cls.__name__}: {arguments!r} ({error})") from None


def _rebuilt_argument(value: Any) -> Any:
    if isinstance(value, list):
        return [_rebuilt_argument(item) for item in value]
    return rebuild(value) if isinstance(value, dict) else value


def _find(name: str) -> type[Part]:
    module, _, qualified = name.partition(":")
    if module.split(".")[0] == __name__.split(".")[0]:
        with suppress(ImportError):  # our own need not have been imported; nobody else's code is run by loading
            importlib.import_module(module)
    found: Any = sys.modules.get(module)
    for attribute in qualified.split("."):
        found = getattr(found, attribute, None)
    if not (isinstance(found, type) and issubclass(found, Part)):
        raise ValueError(f"{name!r} is not a quantizer part known here: import its module ({module}) before loading")
    return found
