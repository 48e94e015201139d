"""Strength, later stages and the switches of a quantizer's life; the arithmetic is tested in test_quantizer.py."""

import pytest
import torch
from torch import Tensor, nn

from qlightning.numerics import STE, AbsMean, Int, Learned, PerChannel, PerGroup, Quantizer, Ternary, parse
from qlightning.numerics.scales import Measured


def gradients(quantizer: Quantizer, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    learned = list(quantizer.learned())
    return list(torch.autograd.grad(quantizer(x), [x, *learned], grad))


@pytest.mark.parametrize("spec", ["int4-g8", "int3-g8-lsq", "ternary-clip", "int4-asym-learned"])
@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_a_ramp_mixes_values_and_gradients_with_the_identity(spec: str, strength: float) -> None:
    x, grad = torch.randn(4, 16), torch.randn(4, 16)
    quantizer = parse(spec)
    quantizer.build((4, 16))
    quantizer.initialize(x)
    full, full_grads = quantizer(x).detach(), gradients(quantizer, x, grad)
    quantizer.set_strength(strength)
    assert torch.allclose(quantizer(x), x + strength * (full - x), atol=1e-6)
    grad_x, *rest = gradients(quantizer, x, grad)
    assert torch.allclose(grad_x, grad + strength * (full_grads[0] - grad), atol=1e-6)
    for mixed, whole in zip(rest, full_grads[1:], strict=True):
        assert torch.allclose(mixed, strength * whole, atol=1e-6)
    quantizer.set_strength(1.0)
    assert torch.equal(quantizer(x), full)


def test_no_strength_is_the_identity_bit_for_bit() -> None:
    x = torch.randn(4, 16).bfloat16()
    quantizer = parse("ternary")
    quantizer.set_strength(0.0)
    assert torch.equal(quantizer(x), x)


def test_evaluation_and_export_run_the_deployed_grid_during_a_ramp() -> None:
    x = torch.randn(4, 16)
    quantizer = parse("int4-g8")
    deployed = quantizer(x)
    quantizer.set_strength(0.5)
    assert not torch.equal(quantizer(x), deployed)
    quantizer.eval()
    assert torch.equal(quantizer(x), deployed)
    assert torch.equal(quantizer.dequantize(quantizer.quantize(x), x.dtype), deployed)


def test_strength_is_checked() -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        parse("int4").set_strength(1.5)


def test_becoming_another_quantizer_is_being_it() -> None:
    x = torch.randn(4, 16)
    quantizer = parse("int8-g8")
    quantizer.become(parse("int4-g8-mse"))
    assert torch.equal(quantizer(x), parse("int4-g8-mse")(x))
    assert quantizer == parse("int4-g8-mse")


def test_a_learned_step_is_settled_anew_for_the_new_format() -> None:
    x = torch.randn(4, 16)
    quantizer, fresh = parse("int8-lsq"), parse("int3-lsq")
    for each in (quantizer, fresh):
        each.build((4, 16))
        each.initialize(x)
    steps = list(quantizer.learned())
    quantizer.become(parse("int3-lsq"))
    quantizer.initialize(x)
    assert torch.equal(quantizer(x), fresh(x))
    assert [id(p) for p in quantizer.learned()] == [id(p) for p in steps]


@pytest.mark.parametrize(
    ("now", "later", "why"),
    [
        ("int8-g8", "int4-g4", "granularity"),
        ("int8-g8", "int4-g8-lsq", "dynamic"),
        ("int8-g8-lsq", "int4-g8", "dynamic"),
        ("int8-g8", "int4-g8-sr", "rounding"),
        ("int8-lsq", "int4-asym-learned", "zero point"),
    ],
)
def test_what_needs_other_state_is_refused(now: str, later: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse(now).become(parse(later))


def test_a_checkpoint_of_a_later_stage_loads() -> None:
    x = torch.randn(4, 16)
    trained = parse("int8-g8")
    trained.become(parse("int4-g8"))
    fresh = parse("int8-g8")
    with pytest.raises(ValueError, match="convert the model"):
        fresh.load_state_dict(trained.state_dict())
    fresh.stages = (parse("int6-g8"), parse("int4-g8"))
    fresh.load_state_dict(trained.state_dict())
    assert fresh == parse("int4-g8")
    assert torch.equal(fresh(x), trained(x))


class Extremes(Measured):
    """L4Q's initial step, max(|min / low|, |max / high|), and an offset of zero."""

    offset = True

    def measure(self, blocks: Tensor, format: object) -> tuple[Tensor, Tensor]:
        low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
        scale = torch.maximum((low / -8).abs(), (high / 7).abs())
        return scale, -8 * scale


def test_a_real_offset_has_the_gradients_of_lsq_plus() -> None:
    """Against autograd of the formula: q = round(clamp((w - b) / s)), y = s q + b with straight-through rounding."""
    w = torch.randn(3, 16, dtype=torch.float32) * 2
    grad = torch.randn(3, 16)
    quantizer = parse("int4-asym-learned")
    quantizer.format.low, quantizer.format.high = -8, 7
    quantizer.scale = Learned(Extremes(), zero="real")
    quantizer.build((3, 16))
    quantizer.initialize(w)
    scale, offset = quantizer.learned()
    assert torch.equal(offset, torch.zeros_like(offset))
    with torch.no_grad():
        scale *= 0.7
        offset += 0.3 * torch.randn_like(offset)
    got = gradients(quantizer, w, grad)
    s, b, x = (t.detach().double().requires_grad_() for t in (scale, offset, w))
    u = (x - b) / s
    clamped = u.clamp(-8, 7)
    q = clamped + (torch.round(clamped) - clamped).detach()
    expected = torch.autograd.grad(s * q + b, [x, s, b], grad.double())
    assert torch.allclose(quantizer(w).double(), (s * q + b), atol=1e-5)
    for ours, reference in zip(got, expected, strict=True):
        assert torch.allclose(ours.double(), reference, atol=1e-4)


def test_a_real_offset_is_stored_as_it_is() -> None:
    w = torch.randn(3, 16)
    quantizer = Quantizer(Int(4, symmetric=False), PerChannel(), scale=Learned(zero="real"))
    quantizer.build((3, 16))
    quantizer.initialize(w)
    stored = quantizer.quantize(w)
    assert stored.zero_point is not None
    assert stored.zero_point.dtype == torch.float32
    assert torch.equal(quantizer.dequantize(stored, w.dtype), quantizer(w))


def test_a_frozen_rounding_moves_values_and_never_codes() -> None:
    w = torch.randn(3, 16)
    quantizer = Quantizer(Int(3), PerChannel(), scale=Learned(rounding="frozen"))
    quantizer.build((3, 16))
    quantizer.initialize(w)
    codes, (step,) = quantizer.quantize(w).codes, quantizer.learned()
    with torch.no_grad():
        step *= 1.3
    assert torch.equal(quantizer.quantize(w).codes, codes)
    assert torch.equal(quantizer(w), codes * step)
    grad = torch.randn(3, 16)
    _, grad_step = gradients(quantizer, w, grad)
    assert torch.allclose(grad_step, (grad * codes).sum(1, keepdim=True), atol=1e-5)
    quantizer.scale.release()
    assert not torch.equal(quantizer.quantize(w).codes, codes)


def test_a_held_rounding_survives_a_checkpoint() -> None:
    w = torch.randn(3, 16)
    one, other = (Quantizer(Int(3), PerChannel(), scale=Learned(rounding="frozen")) for _ in range(2))
    for each in (one, other):
        each.build((3, 16))
    one.initialize(w)
    with torch.no_grad():
        next(one.learned()).mul_(0.8)
    one.scale.release()
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(w), one(w))
    one.scale.hold()
    with torch.no_grad():
        next(one.learned()).mul_(1.4)
    assert not torch.equal(other(w), one(w))
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(w), one(w))


def test_only_a_frozen_rounding_can_be_held() -> None:
    scale = Learned()
    scale.build((1, 1), Int(4))
    with pytest.raises(ValueError, match="rounding='frozen'"):
        scale.hold()


def test_a_learned_scale_names_its_options() -> None:
    with pytest.raises(ValueError, match="zero='integer' or 'real'"):
        Learned(zero="float")


def test_bytes_count_codes_scales_and_zero_points() -> None:
    assert parse("int4-g8").stored_bytes((4, 16), torch.bfloat16) == 32 + 8 * 2
    assert Quantizer(Ternary(), scale=AbsMean()).stored_bytes((5, 3), torch.float32) == 4 + 4
    real = Quantizer(Int(4, symmetric=False), PerGroup(8), scale=Learned(zero="real"), gradient=STE())
    assert real.stored_bytes((4, 16), torch.bfloat16) == 32 + 8 * 4 + 8 * 2


def test_a_composite_is_one_quantizer_of_a_model() -> None:
    from qlightning.layers.convert import quantizers_of

    class Twice(Quantizer):
        pass

    module = nn.Module()
    module.weight_quantizer = Twice(Int(4))
    module.weight_quantizer.stage = parse("int4")
    assert [name for name, _ in quantizers_of(module)] == ["weight_quantizer"]
