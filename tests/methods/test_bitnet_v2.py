"""BitNet v2 against its formulas and the numbers of its card; tests/numerics/test_hadamard.py has the rotation."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlightning import convert
from qlightning.callbacks.stages import plan_stages
from qlightning.methods import BitNetV2
from qlightning.numerics import Int, PerToken, Quantizer
from qlightning.numerics.absmax_over import AbsMaxOver
from qlightning.numerics.hadamard import hadamard


class Block(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.down_proj = nn.Linear(96, width, bias=False)


def converted(**options: Any) -> tuple[Block, dict[str, Any]]:
    block, arguments = Block(), BitNetV2(**options).quantization()
    convert(block, arguments["rules"])
    return block, arguments


def four_bits() -> Quantizer:
    return BitNetV2(input_bits=4, late_bits=None).quantization()["rules"]["*"].input


def gaussian() -> Tensor:
    return torch.randn(2000, 256, generator=torch.Generator().manual_seed(0))


def nmse(quantizer: Quantizer, x: Tensor) -> float:
    return float((quantizer(x) - x).square().mean() / x.square().mean())


def test_four_bits_saturate_as_much_of_a_gaussian_as_the_card_says() -> None:
    x = gaussian()
    s = 7**0.5 / x.abs().mean(1, keepdim=True)
    outside = ((x * s).round() > 7) | ((x * s).round() < -8)
    assert outside.float().mean().item() == pytest.approx(0.017, abs=0.001)
    assert nmse(four_bits(), x) == pytest.approx(0.013, abs=0.0005)
    assert nmse(Quantizer(Int(4), PerToken(), scale=AbsMaxOver(7)), x) == pytest.approx(0.016, abs=0.0005)


def test_four_bits_are_equation_8_and_eight_bits_reach_127() -> None:
    x = gaussian()[:20]
    s = 7**0.5 / x.abs().mean(1, keepdim=True)
    assert torch.allclose(four_bits()(x), (x * s).round().clamp(-8, 7) / s, rtol=1e-5)
    eight: Quantizer = BitNetV2().quantization()["rules"]["*"].input
    s = 127 / x.abs().amax(1, keepdim=True)
    assert torch.allclose(eight(x), (x * s).round().clamp(-128, 127) / s, rtol=1e-5)


def test_an_ordinary_layer_multiplies_codes_with_ternary_weights() -> None:
    block, _ = converted()
    x, w = torch.randn(4, 48), block.q_proj.weight.detach()
    alpha = w.abs().mean()
    w_q = alpha * (w / (alpha + 1e-9)).round().clamp(-1, 1)
    eight: Quantizer = BitNetV2().quantization()["rules"]["*"].input
    assert torch.allclose(block.q_proj(x), eight(x) @ w_q.t(), atol=1e-4)


@pytest.mark.parametrize(("norm", "name", "size"), [("rms", "o_proj", 16), ("none", "down_proj", 32)])
def test_a_rotated_layer_normalises_rotates_and_quantizes(norm: str, name: str, size: int) -> None:
    block, _ = converted(norm=norm)
    linear: Any = getattr(block, name)
    x = 3 * torch.randn(4, linear.in_features, requires_grad=True)
    normed = x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt() if norm == "rms" else x
    eight: Quantizer = BitNetV2().quantization()["rules"]["*"].input
    expected = eight(hadamard(normed, size)) @ linear.weight_quantizer(linear.weight).t()
    assert torch.allclose(linear(x), expected, atol=1e-4)
    grad = torch.randn(4, 48)
    found, wanted = (torch.autograd.grad(y, x, grad, retain_graph=True)[0] for y in (linear(x), expected))
    assert torch.allclose(found, wanted, atol=1e-4)


def test_the_rotated_width_is_in_the_checkpoint() -> None:
    block, _ = converted(norm="none")
    sizes = {name: int(value) for name, value in block.state_dict().items() if name.endswith("transform.size")}
    assert sizes == {"o_proj.transform.size": 16, "down_proj.transform.size": 32}


def test_every_input_changes_to_four_bits_at_the_switch_and_no_weight() -> None:
    block, arguments = converted(switch=0.9)
    first, later = arguments["schedule"]
    assert later.at == 0.9
    stages = plan_stages(block, arguments["rules"], [first.rules, later.rules])  # type: ignore[arg-type]
    assert stages[0] == {}
    assert set(stages[1]) == {"q_proj.input", "o_proj.input", "down_proj.input"}
    assert all(stage == four_bits() for stage in stages[1].values())
    quantizer: Any = block.o_proj.input_quantizer
    quantizer.become(stages[1]["o_proj.input"])
    assert torch.equal(quantizer(x := torch.randn(3, 48)), four_bits()(x))


def test_there_need_be_no_switch_and_no_rotation() -> None:
    assert "schedule" not in BitNetV2(late_bits=None).quantization()
    assert list(BitNetV2(rotated=()).quantization()["rules"]) == ["*"]
    assert BitNetV2(rotated="down_proj").rotated == ("down_proj",)
    with pytest.raises(ValueError, match="norm='layer'"):
        BitNetV2(norm="batch").quantization()  # type: ignore[arg-type]
