"""The table of what travels as codes, and why the rest does not."""

import pytest
import torch
from torch import nn

import qlightning
from qlightning.adapters.lora import LoRA
from qlightning.strategies.plan import Plan


def plan_of(spec="int4-g8", net=None, columns=16, **scheme):
    net = nn.Sequential(nn.Linear(columns, 8), nn.LayerNorm(8)) if net is None else net
    qlightning.convert(net, {"*": qlightning.Scheme(spec, **scheme)}, min_coverage=0.0)
    return Plan(net, ranks=2)


def test_bytes_are_counted_before_anything_is_sent():
    plan = plan_of()
    (route,) = plan.routes
    assert (route.reason, route.numel, route.bytes) == (None, 128, 64 + 16 * 4)
    assert plan.rest == (24, 96)
    assert "0.500x bf16  codes" in plan.table()
    assert "moves 224 bytes where quantizers act: 0.737x bf16" in plan.table()


@pytest.mark.parametrize(
    ("spec", "scheme", "reason"),
    [
        ("gguf-q4_0", {}, "other bits"),
        ("int4-g8", {"adapter": LoRA(rank=2)}, "adapter inside"),
        ("int8-channel", {"backward": {"grad_dgrad": "int8-tensor", "weight_dgrad": None}}, "backward pass"),
    ],
    ids=["scale", "adapter", "backward"],
)
def test_reasons(spec, scheme, reason):
    plan = plan_of(spec, columns=32, **scheme)
    (route,) = plan.routes
    assert reason in route.reason
    assert route.bytes == 4 * route.numel
    assert f"in full: {route.reason}" in plan.table()


@pytest.mark.parametrize(
    "scheme",
    [{"input": "int8-token", "product": "codes"}, {"backward": {"grad_dgrad": "int8-tensor"}}],
    ids=["products of codes", "backward"],
)
def test_what_needs_the_quantized_weight_alone(scheme):
    (route,) = plan_of("int8-channel", **scheme).routes
    assert route.reason is None


def test_a_base_that_is_kept_as_codes():
    plan = plan_of("int4-channel-learned", adapter=LoRA(rank=2, base="codes"))
    (route,) = plan.routes
    assert (route.kept_bits, route.bytes) == (4, 16 * 8 // 2)
    assert "0.250x bf16  codes, as it is kept" in plan.table()
    (route,) = plan_of("int4-channel-learned", adapter=LoRA(rank=2, base="fixed")).routes
    assert (route.kept_bits, route.bytes) == (None, 16 * 8)


def test_a_frozen_weight_whose_scale_learns():
    net = nn.Sequential(nn.Linear(16, 8).requires_grad_(False))
    qlightning.convert(net, "int4-lsq")
    (route,) = Plan(net, ranks=2).routes
    assert "frozen" in route.reason


def test_output_channels_along_dimension_1():
    transformers = pytest.importorskip("transformers")
    net = nn.Sequential(transformers.pytorch_utils.Conv1D(8, 16))
    (route,) = plan_of("int8-channel", net).routes
    assert "dimension 0" in route.reason


def test_a_shared_weight_is_one_route():
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    net[1].weight = net[0].weight
    qlightning.convert(net, "int8-channel", tied="share")
    (route,) = Plan(net, ranks=2).routes
    assert [layer for layer, _ in route.layers] == list(net)
    assert torch.Size([route.numel]) == torch.Size([64])
