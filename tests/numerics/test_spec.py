"""Specs both ways over generated words, errors that correct, and plain data that builds parts and nothing else."""

import itertools
import json
import random
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qlightning.numerics as numerics
from qlightning.numerics import (
    EMA,
    LSQ,
    MSE,
    NF4,
    STE,
    AbsMax,
    AbsMean,
    AbsMedian,
    Binary,
    ClippedSTE,
    Float,
    Int,
    Learned,
    Levels,
    LSQStep,
    MinMax,
    NoGradient,
    PerBlock,
    Percentile,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    PowerOfTwo,
    Quantizer,
    Stochastic,
    Ternary,
    TwoLevel,
    UInt,
    log_levels,
    parse,
    unparse,
)
from qlightning.numerics.quantizer import read_extra_state
from qlightning.numerics.spec import describe, rebuild

HEADS = [*(f"int{n}" for n in range(1, 17)), *(f"uint{n}" for n in range(1, 9)), *(f"log{n}" for n in range(2, 9))]
HEADS += ["fp4e2m1", "fp6e2m3", "fp6e3m2", "fp8e4m3", "fp8e5m2", "ternary", "binary", "nf4", "nvfp4", "mxfp4"]
HEADS += ["mxfp6e2m3", "mxfp6e3m2", "mxfp8e4m3", "mxfp8e5m2"]
WORDS = [
    ["", "asym", "narrow"],
    ["", "tensor", "channel", "token", "g32", "g128", "b16x16", "b1x128"],
    ["", "absmax", "minmax", "absmean", "absmedian", "p99.9", "p50", "mse", "ema", "learned", "lsq"],
    ["", "ste", "clip"],
    ["", "sr"],
    ["", "sfp32", "sbf16", "sfp16"],
]
EVERY_SPEC = ["-".join(filter(None, words)) for words in itertools.product(HEADS, *WORDS)]
SAMPLE = random.Random(0).sample(EVERY_SPEC, 500)


def attempt(spec: str) -> Quantizer | str:
    """The quantizer, or the message that refuses it."""
    try:
        return parse(spec)
    except ValueError as error:
        return str(error)


def test_every_spec_round_trips_or_is_corrected():
    accepted = refused = 0
    for spec in SAMPLE:
        result = attempt(spec)
        if isinstance(result, Quantizer):
            accepted += 1
            canonical = unparse(result)
            assert canonical is not None, spec
            assert parse(canonical) == result, spec
            assert unparse(parse(canonical)) == canonical
        else:
            refused += 1
            assert result.startswith(f"spec {spec!r}: ")
            suggestion = re.search(r"did you mean '([^']+)'\?", result)
            assert suggestion, result
            assert suggestion[1] != spec
            assert isinstance(attempt(suggestion[1]), Quantizer), result
    assert accepted > 100
    assert refused > 100


def test_every_format_name_means_what_it_says():
    for head in HEADS:
        if head == "int1":
            continue
        quantizer = parse(head)
        assert unparse(quantizer) == head
        if digits := re.search(r"\d+", head):
            assert quantizer.format.bits == int(digits[0])
    assert parse("int4-g128") == Quantizer(Int(4), PerGroup(128))
    assert parse("int8-token") == Quantizer(Int(8), PerToken())
    assert parse("int8-asym-channel") == Quantizer(Int(8, symmetric=False), PerChannel())
    assert parse("fp8e4m3-token") == Quantizer(Float(4, 3), PerToken())
    assert parse("nvfp4") == Quantizer(Float(2, 1), PerGroup(16), scale=TwoLevel())
    assert parse("mxfp4") == Quantizer(Float(2, 1), PerGroup(32), scale=PowerOfTwo())
    assert parse("nf4-g64") == Quantizer(Levels(NF4), PerGroup(64))
    assert parse("ternary-absmean") == Quantizer(Ternary(), PerTensor(), scale=AbsMean())
    assert parse("binary") == Quantizer(Binary(), PerChannel(), scale=AbsMean())
    assert parse("log4") == Quantizer(log_levels(4), PerChannel())
    assert parse("uint8") == Quantizer(UInt(8), PerTensor())
    assert parse("int4-lsq") == Quantizer(Int(4), PerChannel(), scale=Learned(LSQStep()), gradient=LSQ())
    assert parse("int8-b16x16-p99.5-clip-sr-sbf16") == Quantizer(
        Int(8),
        PerBlock(16, 16),
        scale=Percentile(99.5),
        gradient=ClippedSTE(),
        rounding=Stochastic(),
        scale_dtype=torch.bfloat16,
    )


@given(words=st.permutations(["asym", "g32", "mse", "clip", "sr", "sbf16"]), upper=st.booleans())
def test_order_and_case_do_not_matter(words, upper):
    spec = "-".join(["int4", *words])
    assert parse(f" {spec.upper() if upper else spec} ") == parse("int4-asym-g32-mse-clip-sr-sbf16")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("it4-g128", "int4-g128"),
        ("int4-g12x", "int4-g128"),
        ("it8-tokn", "int8-token"),
        ("int4_g128", "int4-g128"),
        ("int4 g64", "int4-g64"),
        ("int8-chanel", "int8-channel"),
        ("int8-per-token", "int8-token"),
        ("fp8", "fp8e4m3"),
        ("nvf4", "nvfp4"),
        ("mxfp-4", "mxfp4"),
        ("nf4-g0", "nf4"),
        ("trinary", "ternary"),
        ("int17", "int4-g128"),  # 'int1', the closest name, is a format only with 'asym'
        ("int4-g128-g64", "int4-g128"),
        ("int4-lsq-clip", "int4-lsq"),
        ("int8-asym-absmax", "int8-asym"),
        ("int8-minmax", "int8"),
        ("int4-asym-narrow", "int4-asym"),
        ("fp8e4m3-asym", "fp8e4m3"),
        ("nvfp4-sbf16", "nvfp4"),
        ("int8-p0", "int8"),
        ("int4-", "int4"),
        ("", "int4-g128"),
        (None, "int4-g128"),
        (4, "int4-g128"),
    ],
)
def test_a_wrong_spec_names_the_nearest_right_one(wrong, right):
    message = attempt(wrong)
    assert isinstance(message, str)
    assert repr(wrong) in message
    assert message.endswith(f"did you mean {right!r}?")


@given(text=st.text(alphabet="intfpgx48-em_ .", max_size=24))
def test_any_text_is_parsed_or_corrected(text):
    result = attempt(text)
    if isinstance(result, str):
        assert isinstance(attempt(re.search(r"did you mean '([^']+)'\?", result)[1]), Quantizer)


def test_unknown_words_list_what_is_known():
    with pytest.raises(ValueError, match=r"unknown format 'foo' \(known: int1 to int16, uint1 to uint8, .*nvfp4"):
        parse("foo")
    with pytest.raises(ValueError, match=r"unknown word 'foo' \(known: asym, .*g128, b16x16, p99\.9\)"):
        parse("int4-foo")


def test_each_parse_has_its_own_state():
    a, b = parse("int8-tensor-ema-sr"), parse("int8-tensor-ema-sr")
    a.build((-1, 8))
    a.initialize(torch.randn(2, 8))
    a.rounding.advance()
    assert a.ready
    assert not b.ready
    assert int(b.rounding.step) == 0
    assert not parse("int8-tensor-ema-sr").ready


# --- plain data ---

positive = st.floats(0.015625, 4, width=16)
sources = st.one_of(
    st.just(AbsMax()), st.builds(AbsMean, multiplier=positive), st.builds(MSE, steps=st.integers(2, 99), power=positive)
)
scales = st.one_of(
    sources,
    st.builds(AbsMedian, multiplier=positive),
    st.builds(Percentile, st.floats(0.001, 100)),
    st.builds(EMA, decay=st.floats(0.1, 0.999), source=st.none() | sources),
    st.builds(Learned, st.none() | sources | st.just(LSQStep())),
    st.builds(PowerOfTwo, rule=st.sampled_from(["floor", "ceil", "rceil", "even"])),
    st.builds(TwoLevel, rounding=st.sampled_from(["nearest", "up"])),
)
formats = st.one_of(
    st.builds(Int, st.integers(2, 16), range=st.sampled_from(["full", "narrow"])),
    st.builds(UInt, st.integers(1, 8)),
    st.builds(Float, st.integers(2, 4), st.integers(1, 3), specials=st.sampled_from([None, "none", "nan", "ieee"])),
    st.builds(Levels, st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=9, unique=True).map(sorted)),
    st.builds(log_levels, st.integers(2, 5), base=st.sampled_from([1.5, 2.0])),
    st.sampled_from([Ternary(), Binary(), Levels(NF4)]),
)
granularities = st.one_of(
    st.sampled_from([PerTensor(), PerChannel(), PerToken()]),
    st.builds(PerGroup, st.integers(1, 512)),
    st.builds(PerBlock, st.integers(1, 64), st.integers(1, 64)),
)
gradients = st.one_of(
    st.sampled_from([STE(), NoGradient()]),
    st.builds(ClippedSTE, edge=st.sampled_from(["value", "code"])),
    st.builds(LSQ, factor=st.just("count") | positive),
)


@st.composite
def quantizers(draw) -> Quantizer:
    asym = draw(st.booleans())
    scale = draw(scales) if not asym else draw(st.sampled_from([MinMax(), MSE(steps=7), EMA(decay=0.5), Learned()]))
    format = draw(formats) if not asym else Int(draw(st.integers(1, 16)), symmetric=False)
    dtypes = [None] if scale.ships_as else [None, torch.float32, torch.bfloat16, torch.float16]
    return Quantizer(
        format,
        draw(granularities),
        scale=scale,
        gradient=draw(gradients),
        rounding=draw(st.none() | st.builds(Stochastic, seed=st.integers(0, 99))),
        scale_dtype=draw(st.sampled_from(dtypes)),
    )


@given(quantizer=quantizers())
def test_any_quantizer_survives_json_and_its_own_repr(quantizer):
    data = json.loads(json.dumps(describe(quantizer)))
    assert rebuild(data) == quantizer
    assert describe(rebuild(data)) == describe(quantizer)
    assert eval(repr(quantizer), {**vars(numerics), "torch": torch}) == quantizer
    spec = unparse(quantizer)
    assert spec is None or parse(spec) == quantizer


@given(a=quantizers(), b=quantizers())
def test_equality_is_that_of_the_arguments(a, b):
    assert (a == b) == (repr(a) == repr(b))
    assert a.deploys_like(a)
    same = all(repr(getattr(a, n)) == repr(getattr(b, n)) for n in ("format", "granularity", "scale", "scale_dtype"))
    assert a.deploys_like(b) == same


class Diagonal(PerTensor):
    """A part of someone else's module."""


def test_parts_of_other_modules_are_described_by_their_class():
    quantizer = Quantizer(Int(4), Diagonal(), scale=EMA(decay=0.5))
    assert unparse(quantizer) is None
    data = json.loads(json.dumps(describe(quantizer)))
    assert data["arguments"]["granularity"]["class"] == f"{Diagonal.__module__}:Diagonal"
    assert rebuild(data) == quantizer
    assert json.loads(json.dumps(read_extra_state(quantizer.get_extra_state())))["quantizer"] == data
    elsewhere = json.loads(json.dumps(data).replace(Diagonal.__module__, "somewhere.else"))
    with pytest.raises(ValueError, match=r"import its module \(somewhere\.else\) before loading"):
        rebuild(elsewhere)


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "builtins:eval",
        "builtins:print",
        "subprocess:Popen",
        "torch.nn:Linear",
        "qlightning.numerics.spec:copy.deepcopy",
        "qlightning.numerics.spec:parse",
        "qlightning.numerics.formats:Nothing",
        "qlightning.numerics.formats:",
        "",
    ],
)
def test_only_parts_are_rebuilt(name):
    with pytest.raises(ValueError, match="is not a quantizer part known here"):
        rebuild({"class": name, "arguments": {}})
    nested = {"format": {"class": name, "arguments": {}}}
    with pytest.raises(ValueError, match="is not a quantizer part known here"):
        rebuild({"class": "qlightning.numerics.quantizer:Quantizer", "arguments": nested})


@pytest.mark.parametrize("data", [None, 4, [], {}, {"class": "x"}, {"dtype": "nn"}, {"dtype": 7}, {"dtype": "load"}])
def test_what_is_no_description_is_refused(data):
    with pytest.raises(ValueError, match=r"not a description of a quantizer: .* write a spec such as 'int4-g128'"):
        rebuild(data)
