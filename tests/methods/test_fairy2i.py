"""The checks of the Fairy2i card (S59), against complex arithmetic."""

import pytest
import torch
from torch import nn

from qlightning import convert
from qlightning.layers.swap import convert_like
from qlightning.methods import Fairy2i
from qlightning.methods.fairy2i import PhaseSum, join, phases, split


def complex_parts(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    (u_re, u_im), (v_re, v_im) = split(w)
    return torch.complex(u_re, u_im), torch.complex(v_re, v_im)


def test_splitting_and_joining_gives_the_weight_back() -> None:
    w = torch.randn(6, 10)
    assert torch.allclose(join(split(w)), w, atol=1e-6)


def test_the_complex_form_is_the_real_product() -> None:
    w, x = torch.randn(6, 10, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    u, v = complex_parts(w)
    z = torch.complex(x[:5], x[5:])
    y = u @ z + v @ z.conj()
    assert torch.allclose(torch.cat((y.real, y.imag)), w @ x)


def test_phases_are_the_nearest_power_of_i_by_angle() -> None:
    z = torch.randn(2, 50, 40, dtype=torch.complex128)
    sector = torch.floor((torch.angle(z) + torch.pi / 4) / (torch.pi / 2)) % 4
    expected = 1j**sector
    codes = phases(torch.stack((z.real, z.imag), dim=1))
    assert torch.allclose(torch.complex(codes[:, 0], codes[:, 1]).to(z.dtype), expected)


@pytest.mark.parametrize(("z", "power"), [(1 - 1j, 0), (1 + 1j, 1), (-1 + 1j, 2), (-1 - 1j, 3), (0j, 0)])
def test_edges_of_sectors_go_counterclockwise(z: complex, power: int) -> None:
    codes = phases(torch.tensor([z.real, z.imag]).view(1, 2, 1, 1))
    assert complex(codes[0, 0], codes[0, 1]) == pytest.approx(1j**power)


def test_turning_the_weight_turns_its_codes_and_swaps_its_scales() -> None:
    w = torch.randn(1, 2, 5, 6)
    turned = torch.stack((-w[:, 1], w[:, 0]), dim=1)
    codes = phases(w)
    assert torch.equal(phases(turned), torch.stack((-codes[:, 1], codes[:, 0]), dim=1))


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_each_stage_takes_away_what_the_card_says(stages: int) -> None:
    """|E'|^2 = |E|^2 - n_re s_re^2 - n_im s_im^2, so that the rest never grows."""
    w = torch.randn(8, 12)
    (scales,) = PhaseSum(stages=stages).grid(w)
    rest = split(w)
    for scale in scales:
        codes = phases(rest)
        count = codes.abs().sum((2, 3), keepdim=True)
        after = rest - codes * scale
        expected = rest.square().sum() - (count * scale.square()).sum()
        assert after.square().sum().item() == pytest.approx(expected.item(), rel=1e-5)
        rest = after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stages", [1, 2])
def test_stored_phases_are_the_trained_weight(dtype: torch.dtype, stages: int) -> None:
    w = torch.randn(8, 12).to(dtype)
    quantizer = PhaseSum(stages=stages)
    stored = quantizer.quantize(w)
    assert all(q.codes.max() <= 3 and q.codes.numel() == 48 for q in stored)
    assert torch.equal(quantizer.dequantize(stored, dtype), quantizer(w))


def test_the_gradient_is_the_identity() -> None:
    w, grad = torch.randn(8, 12, requires_grad=True), torch.randn(8, 12)
    assert torch.equal(torch.autograd.grad(PhaseSum()(w), w, grad)[0], grad)


def test_a_stage_is_one_bit_per_real_weight() -> None:
    assert PhaseSum(stages=1).stored_bytes((64, 64), torch.bfloat16) == 64 * 64 // 8 + 8
    assert PhaseSum(stages=2).stored_bytes((64, 64), torch.bfloat16) == 2 * (64 * 64 // 8 + 8)


def test_more_stages_come_nearer() -> None:
    w = torch.randn(32, 32)
    errors = [(PhaseSum(stages=n)(w) - w).square().mean().item() for n in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)


def test_odd_shapes_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="even number"):
        convert(nn.Sequential(nn.Linear(7, 4)), PhaseSum())


def test_a_checkpoint_loads_without_naming_the_method() -> None:
    net, other = nn.Sequential(nn.Linear(8, 4)), nn.Sequential(nn.Linear(8, 4))
    convert(net, Fairy2i().quantization()["weight"])
    convert_like(other, net.state_dict())
    other.load_state_dict(net.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(other(x), net(x))


def test_a_sum_has_at_least_one_stage() -> None:
    with pytest.raises(ValueError, match="at least one"):
        PhaseSum(stages=0)
