"""Scales with memory: their life cycle, their arithmetic against numpy, and their place in checkpoints."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from qlightning.numerics import (
    EMA,
    LSQ,
    MSE,
    AbsMax,
    AbsMean,
    ClippedSTE,
    Int,
    Learned,
    LSQStep,
    MinMax,
    PerChannel,
    PerGroup,
    PerTensor,
    Quantizer,
    parse,
)


def settled(spec: str, x: torch.Tensor) -> Quantizer:
    quantizer = parse(spec)
    quantizer.build(tuple(x.shape))
    quantizer.initialize(x)
    return quantizer


STATIC = [
    "int8-tensor-ema",
    "int8-asym-tensor-ema",
    "int4-lsq",
    "int4-asym-g8-learned",
    "fp8e4m3-learned",
    "ternary-lsq",
]


@pytest.mark.parametrize("spec", STATIC)
def test_nothing_is_quantized_before_a_scale_is_settled(spec):
    x = torch.randn(4, 16)
    quantizer = parse(spec).eval()
    quantizer.build((4, 16))
    assert not quantizer.ready
    for act in (quantizer, quantizer.quantize, quantizer.grid):
        with pytest.raises(ValueError, match=r"has no scale yet: .* call initialize\(x\) first"):
            act(x)
    with pytest.raises(ValueError, match=r"nothing was observed"):
        quantizer.scale.settle()
    quantizer.observe(x)
    assert not quantizer.ready
    quantizer.scale.settle()
    assert quantizer.ready
    assert not torch.equal(quantizer(x), x)


@pytest.mark.parametrize("spec", STATIC)
def test_initialize_forgets_what_was_seen_before_nan_included(spec):
    x = torch.randn(4, 16)
    quantizer = settled(spec, torch.full((4, 16), float("nan")))
    assert bool(quantizer.eval()(x).isnan().any()), "a spoilt scale must show"
    quantizer.initialize(torch.randn(4, 16) * 100)
    quantizer.initialize(x)
    assert torch.equal(quantizer(x), settled(spec, x).eval()(x))


@pytest.mark.parametrize("asym", [False, True])
def test_ema_follows_numpys_recurrence(asym):
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((5, 16)).astype(np.float32) * k for k in range(1, 8)]
    quantizer = Quantizer(Int(8, symmetric=not asym), scale=EMA(decay=0.9)).train()
    quantizer.build((-1, 16))
    value, lower = None, 0.0
    for x in batches:
        low, high = min(x.min(), 0), max(x.max(), 0)
        scale = (high - low) / 255 if asym else np.abs(x).max() / 127.5
        value, lower = (scale, low) if value is None else (0.9 * value + 0.1 * scale, 0.9 * lower + 0.1 * low)
        quantizer.observe(torch.from_numpy(x))
    quantizer.scale.settle()
    np.testing.assert_allclose(quantizer.scale.value.item(), value, rtol=1e-5)
    if asym:
        np.testing.assert_allclose(quantizer.scale.lower.item(), lower, rtol=1e-5)
        assert quantizer.grid(torch.zeros(1)).zero_point.item() == np.rint(-128 - lower / value)
    else:
        assert quantizer.scale.lower is None


def test_ema_moves_in_training_only_and_not_when_frozen():
    x, far = torch.randn(4, 16), 10 * torch.randn(4, 16)
    quantizer = settled("int8-tensor-ema", x)
    value = quantizer.scale.value.clone()
    quantizer.eval()(far)
    assert torch.equal(quantizer.scale.value, value)
    quantizer.train()(far)
    moved = quantizer.scale.value.clone()
    torch.testing.assert_close(moved, 0.99 * value + 0.01 * far.abs().max() / 127.5)
    quantizer.scale.moving = False
    quantizer(far)
    assert torch.equal(quantizer.scale.value, moved)
    resumed = parse("int8-tensor-ema")
    resumed.build((4, 16))
    resumed.load_state_dict(quantizer.state_dict())
    resumed.train()(far)
    assert torch.equal(resumed.scale.value, moved), "frozen is remembered by the checkpoint"


def test_empty_batches_do_not_move_a_static_scale():
    quantizer = parse("int8-tensor-ema")
    quantizer.build((-1, 8))
    quantizer.initialize(torch.randn(2, 8))
    before = quantizer.scale.value.clone()
    assert quantizer.train()(torch.empty(0, 8)).shape == (0, 8)
    assert torch.equal(quantizer.scale.value, before)


@pytest.mark.parametrize("source", [AbsMax(), AbsMean(multiplier=2.0), MSE(steps=5), LSQStep()], ids=repr)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(4)], ids=repr)
def test_a_learned_step_starts_at_the_mean_of_its_source(granularity, source):
    batches = [torch.randn(6, 8) * k for k in (1, 2, 5)]
    quantizer = Quantizer(Int(4), granularity, scale=Learned(source), gradient=LSQ())
    quantizer.build((6, 8))
    for x in batches:
        quantizer.observe(x)
    quantizer.scale.settle()
    expected = torch.stack([source.measure(granularity.view(x), Int(4))[0] for x in batches]).mean(0)
    torch.testing.assert_close(quantizer.scale.value.detach(), expected)
    assert tuple(quantizer.scale.value.shape) == granularity.scale_shape((6, 8))
    single = Quantizer(Int(4), granularity, scale=source)
    quantizer.initialize(batches[0])
    assert torch.equal(quantizer(batches[0]), single(batches[0])), "its first forward is that of its source"


def test_learned_offset_starts_at_min_max():
    x = torch.randn(6, 8) + 1
    quantizer = settled("int4-asym-g4-lsq", x)
    assert torch.equal(quantizer(x), parse("int4-asym-g4")(x))
    assert quantizer.scale.source is None
    assert Quantizer(Int(4, symmetric=False), scale=Learned(MinMax())).format.symmetric is False


def test_gradient_descent_on_the_step_reduces_the_error():
    torch.manual_seed(0)
    x = torch.randn(16, 64)
    quantizer = settled("int3-asym-learned", x)
    optimizer = torch.optim.Adam(quantizer.learned(), lr=3e-3)
    errors = []
    for _ in range(60):
        loss = (quantizer(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert min(errors[-5:]) < 0.9 * errors[0]


def test_a_source_must_suit_the_format():
    with pytest.raises(ValueError, match=r"source must be MinMax\(\) or MSE\(\)"):
        Quantizer(Int(4, symmetric=False), scale=EMA(source=AbsMax())).build((2, 2))
    with pytest.raises(ValueError, match=r"source must be AbsMax\(\)"):
        Quantizer(Int(4), scale=Learned(MinMax())).build((2, 2))
    with pytest.raises(ValueError, match=r"for example EMA\(decay=0.99\)"):
        EMA(decay=1)


@pytest.mark.parametrize("spec", ["int8-token-ema", "int8-g8-lsq", "int8-channel-learned"])
def test_a_static_scale_of_unknown_size_is_refused(spec):
    with pytest.raises(ValueError, match=r"write a 'tensor' granularity, for example 'int8-tensor-lsq'"):
        parse(spec).build((-1, 16))
    parse("int8-tensor-lsq").build((-1, 16))
    parse("int8-tensor-ema").build((-1, -1))


def test_state_is_float32_under_any_default_dtype():
    """Lightning's bf16-true sets the default dtype while it builds modules and while it runs steps."""
    x = torch.randn(4, 16)
    expected = {spec: settled(spec, x).eval()(x) for spec in STATIC}
    torch.set_default_dtype(torch.bfloat16)
    try:
        for spec in STATIC:
            quantizer = settled(spec, x)
            floating = [t for t in quantizer.state_dict().values() if t.is_floating_point()]
            assert floating
            assert all(t.dtype == torch.float32 for t in floating)
            quantizer.train().observe(x)
            assert torch.equal(quantizer.eval()(x), expected[spec])
    finally:
        torch.set_default_dtype(torch.float32)


# --- checkpoints ---

ALL = [*STATIC, "int4-g8", "nvfp4", "mxfp4-g16", "int4-sr", "nf4-g8", "binary", "int8-asym-token-clip-sbf16"]


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("carry", ["state_dict", "deepcopy", "pickle"])
def test_a_quantizer_survives(spec, carry):
    x = torch.randn(4, 16)
    model = nn.Sequential(nn.Linear(16, 16), settled(spec, x)).eval()
    model[1].observing = True
    expected = model(x)
    if carry == "deepcopy":
        copied = copy.deepcopy(model)
    elif carry == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        fresh = parse(spec)
        fresh.build((4, 16))
        copied = nn.Sequential(nn.Linear(16, 16), fresh)
        copied.load_state_dict(torch.load(file, weights_only=True), strict=True)
    copied.eval()
    assert copied[1] is not model[1]
    assert copied[1] == model[1]
    assert copied[1].observing
    assert copied[1].ready
    assert torch.equal(copied(x), expected)
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in copied.parameters()}
    assert not shared


def test_enabled_and_ready_are_part_of_the_checkpoint():
    x = torch.randn(4, 16)
    quantizer = parse("int4-lsq")
    quantizer.build((4, 16))
    quantizer.enabled = False
    loaded = settled("int4-lsq", x)
    loaded.load_state_dict(quantizer.state_dict())
    assert not loaded.enabled
    assert not loaded.ready
    assert torch.equal(loaded(x), x)


@pytest.mark.parametrize("spec", ["int4-g8", "int4-lsq", "int8-tensor-ema", "int4-sr"])
def test_a_float_checkpoint_loads_and_leaves_the_quantizer_as_it_is(spec):
    x = torch.randn(4, 16)
    model = nn.Sequential(nn.Linear(16, 16), settled(spec, x))
    before = {name: tensor.clone() for name, tensor in model[1].state_dict().items()}
    plain = nn.Sequential(nn.Linear(16, 16)).state_dict()
    keys = set(plain)
    assert model.load_state_dict(plain, strict=True).missing_keys == []
    assert set(plain) == keys, "the caller's dictionary is untouched"
    assert torch.equal(model[0].weight, plain["0.weight"])
    after = model[1].state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_checkpoint_of_another_scheme_is_refused_and_named():
    x = torch.randn(4, 16)
    state = settled("int4-g8", x).state_dict()
    for other in ("int8-g8", "int4-g4", "int4-g8-mse", "int4-g8-sbf16", "int4-asym-g8"):
        with pytest.raises(ValueError, match="convert the model with the checkpoint's own scheme, 'int4-g8'"):
            settled(other, x).load_state_dict(state)
    tuned = Quantizer(Int(4), PerGroup(8), gradient=ClippedSTE())
    tuned.load_state_dict(state)
    assert tuned.gradient == ClippedSTE(), "backward may differ: it does not change what is deployed"


# --- several processes ---


@pytest.mark.parametrize("spec", ["int4-lsq", "int4-asym-learned", "int8-tensor-ema", "int8-asym-tensor-ema"])
def test_merged_observations_are_those_of_one_process(spec):
    """Two ranks observe one and two batches; `reduce` adds what the other rank holds."""
    batches = [torch.randn(4, 16) + 1 for _ in range(3)]
    ranks = [parse(spec).train(), parse(spec).train()]
    for rank, seen in zip(ranks, (batches[:1], batches[1:]), strict=True):
        rank.build((4, 16))
        for x in seen:
            rank.observe(x)
    single = [copy.deepcopy(rank.scale) for rank in ranks]
    sent: list[torch.Tensor] = []
    copy.deepcopy(ranks[1]).scale.merge(lambda t: sent.append(t.clone()) or t)
    ranks[0].scale.merge(lambda t: t + sent.pop(0))
    assert not sent
    ranks[0].scale.settle()
    if "ema" in spec:
        expected = (single[0].value + 2 * single[1].value) / 3
        assert ranks[0].scale.count.item() == 3
    else:
        source = ranks[0].scale.measure
        expected = torch.stack([source(x, ranks[0].format)[0] for x in batches]).mean(0)
    torch.testing.assert_close(ranks[0].scale.value.detach(), expected)
