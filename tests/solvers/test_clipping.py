"""The learned range against its formula, written down once more for autograd."""

import pytest
import torch

from qlightning.numerics.autograd import Ship
from qlightning.numerics.gradients import ClippedSTE
from qlightning.numerics.spec import parse
from qlightning.solvers.clipping import SigmoidClip


def ship(scale):
    return Ship.apply(scale, torch.float32)


def by_hand(weight, gamma, beta):
    """ApiQ's asymmetric grid on signed codes, straight-through."""

    def ste(x):
        return x + (x.round() - x).detach()

    high = torch.sigmoid(gamma) * weight.amax(-1, keepdim=True).clamp(min=0)
    low = torch.sigmoid(beta) * weight.amin(-1, keepdim=True).clamp(max=0)
    scale = (high - low) / 7
    zero = -4 + ste(-low / scale)
    return (ste(weight / scale + zero).clamp(-4, 3) - zero) * scale


def test_values_and_gradients_are_those_of_the_formula():
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    quantizer = parse("int3-g8-asym")
    blocks = quantizer.granularity.view(weight)
    quantizer.scale, quantizer.gradient = SigmoidClip(start=1.0).fit(blocks, quantizer.format), ClippedSTE(edge="code")
    gamma, beta = (torch.ones(4, 2, 1, requires_grad=True) for _ in range(2))
    wanted = by_hand(blocks, gamma, beta).view(4, 16)
    ours = quantizer(weight)
    torch.testing.assert_close(ours, wanted)
    grad = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    ours.backward(grad)
    wanted.backward(grad)
    torch.testing.assert_close(quantizer.scale.gamma.grad, gamma.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantizer.scale.beta.grad, beta.grad, rtol=1e-4, atol=1e-5)
    assert set(quantizer.learned()) == {quantizer.scale.gamma, quantizer.scale.beta}


@pytest.mark.parametrize("spec", ["int4", "int3-g8", "int3-g8-asym"])
def test_a_wide_open_range_is_the_full_one(spec):
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    plain, quantizer = parse(spec), parse(spec)
    quantizer.scale = SigmoidClip(start=40.0).fit(quantizer.granularity.view(weight), quantizer.format)
    torch.testing.assert_close(quantizer(weight).detach(), plain(weight))
    assert (quantizer.scale.beta is None) == plain.format.symmetric
