"""The NVFP4 recipe against its formulas and other implementations; its slots in general: layers/test_backward.py."""

import pytest
import torch
from torch import Tensor, nn

from qlightning import Scheme, convert
from qlightning.layers.backward import Backward
from qlightning.methods import NVFP4Training
from qlightning.methods.nvfp4_training import SIGNS
from qlightning.numerics import Stochastic, pack, parse


def scheme(**arguments: object) -> Scheme:
    return NVFP4Training(**arguments).quantization()["rules"]["*"]


def layer(wanted: Scheme, sizes: tuple[int, int] = (32, 48)) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*sizes))
    convert(model, {"*": wanted})
    return model[0]


def pass_through(linear: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    linear.zero_grad()
    y = linear(x)
    y.backward(grad)
    return y.detach(), x.grad, linear.weight.grad


def data(tokens: int = 32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(tokens, 32), torch.randn(tokens, 48)


def tile_by_tile(w: Tensor) -> Tensor:
    """16 x 16 tiles with loops: E4M3 scales of the tiles' maxima under one scale of the tensor's."""
    values = torch.empty_like(w)
    encode = 2688 / w.abs().max()
    for row in range(0, w.shape[0], 16):
        for column in range(0, w.shape[1], 16):
            tile = w[row : row + 16, column : column + 16]
            step = (tile.abs().max() / 6 * encode).to(torch.float8_e4m3fn).float() / encode
            codes = parse("fp4e2m1-tensor").format.snap(tile / step, torch.round)
            values[row : row + 16, column : column + 16] = codes * step
    return values


def test_a_tiled_weight_is_the_same_numbers_transposed_and_rows_of_16_are_not() -> None:
    w = torch.randn(64, 96)
    tiles, rows = scheme().weight, scheme(weights="1d").weight
    assert torch.equal(tiles(w.t()), tiles(w).t())
    assert torch.equal(tiles(w), tile_by_tile(w))
    stored, transposed = tiles.quantize(w), tiles.quantize(w.t().contiguous())
    assert torch.equal(stored.codes.t(), transposed.codes)
    assert torch.equal(stored.scale.squeeze(-1).t().float(), transposed.scale.squeeze(-1).float())
    assert not torch.equal(rows(w.t()), rows(w).t())


def test_golden_codes_of_inputs() -> None:
    x = torch.tensor([[-3 + i / 2 for i in range(16)], [(i - 7) / 8 for i in range(16)], [0.0] * 16])
    stored = scheme().input.quantize(x)
    assert stored.scale.view(torch.uint8).flatten().tolist() == [0x7E, 0x6C, 0x00]
    shown = [bytes(row.tolist()).hex() for row in pack(stored.codes, 4)]
    assert shown == ["decd9b1043556677", "efdebc0a32546677", "0000000000000000"]


def test_the_rotation_is_torchaos_with_the_signs_of_transformer_engine() -> None:
    from torchao.prototype.moe_training.nvfp4_training.hadamard_utils import get_rht_matrix

    assert "".join("+" if sign > 0 else "-" for sign in SIGNS) == "+++-+------+-+--"
    matrix = get_rht_matrix(SIGNS, "cpu", torch.float32, 16)
    rotation = scheme().backward.rotation
    assert torch.equal(rotation(torch.eye(16)), matrix)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(16), atol=1e-6)


@pytest.mark.parametrize("weights", ["2d", "1d"])
def test_three_products(weights) -> None:
    """fprop and dgrad without a rotation, wgrad with one; scales are those of the rotated operands."""
    x, grad = data()
    linear = layer(scheme(gradients="nearest", weights=weights))
    y, grad_x, grad_w = pass_through(linear, x, grad)
    q, w = parse("nvfp4"), linear.weight.detach()
    assert torch.equal(y, nn.functional.linear(q(x), tile_by_tile(w) if weights == "2d" else q(w), linear.bias))
    assert torch.equal(grad_x, q(grad) @ (tile_by_tile(w) if weights == "2d" else q(w.t()).t()))
    signs, h = torch.tensor(SIGNS), scheme().backward.rotation(torch.eye(16)) * torch.tensor(SIGNS)[:, None]
    turned = [((t.t().unflatten(1, (-1, 16)) * signs) @ h).flatten(1) for t in (grad, x)]
    assert torch.allclose(grad_w, q(turned[0]) @ q(turned[1]).t(), rtol=1e-4, atol=1e-4)


def test_operands_of_wgrad_are_those_of_compressed_tensors() -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    x, _ = data(64)
    slots = scheme().backward
    rotated = slots.tokens_last(x)
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    overall = generate_gparam(rotated.min(), rotated.max())
    blocks = rotated.unflatten(1, (-1, 16))
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=overall)
    stored = slots.input_wgrad.quantize(rotated)
    assert torch.equal(stored.scale.squeeze(-1).float(), scale.float())
    codes = quantize(rotated, scale.float(), zero, args, global_scale=overall)
    assert torch.equal(codes, slots.input_wgrad.format.decode(stored.codes))


@pytest.mark.parametrize("tokens", [32, 21, 1])
def test_the_rotation_alone_changes_nothing(tokens) -> None:
    x, grad = data(tokens)
    linear = layer(Scheme("nvfp4-b16x16", backward=Backward(rotation=scheme().backward.rotation)))
    got, plain = pass_through(linear, x, grad)[2].double(), grad.double().t() @ x.double()
    assert float((got - plain).norm() / plain.norm()) < 1e-6


def test_gradients_and_nothing_else_are_rounded_stochastically() -> None:
    x, grad = data()
    linear = layer(scheme())
    noisy = [name for name, child in linear.named_modules() if isinstance(child, Stochastic)]
    assert noisy == ["backward.grad_dgrad.rounding", "backward.grad_wgrad.rounding"]
    first = pass_through(linear, x, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, pass_through(linear, x, grad), strict=True))
    for child in linear.modules():
        if isinstance(child, Stochastic):
            child.advance()
    second = pass_through(linear, x, grad)
    assert [torch.equal(a, b) for a, b in zip(first, second, strict=True)] == [True, False, False]


def test_the_mean_of_rotated_gradients_is_exact_when_scales_are_rounded_up() -> None:
    """Over 2000 draws; rounded to the nearest, scales clip the maxima of half of the blocks."""
    error = {}
    for rounding in ("up", "nearest"):
        slots = layer(scheme(block_scale=rounding)).backward
        rotated = slots.tokens_last(data(16)[1])
        draws = slots.grad_wgrad(rotated.repeat(2000, 1)).view(2000, *rotated.shape)
        error[rounding] = float((draws.mean(0) - rotated).norm() / rotated.norm())
    assert error["up"] < 0.01
    assert error["nearest"] > 1.5 * error["up"]


def test_which_blocks_stay_in_float() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(32, 32) for _ in range(20)), "head": nn.Linear(32, 32)})
    rules = NVFP4Training(first_in_float=2).quantization()["rules"]
    coverage = convert(model, rules)
    assert [row.name for row in coverage.rows if not row.quantizers] == [f"layers.{i}" for i in (0, 1, 17, 18, 19)]
    assert "grad_dgrad Quantizer" in coverage.table() or "grad_dgrad nvfp4-sr" in coverage.table()
    assert list(NVFP4Training(0).quantization()["rules"]) == ["*"]


def test_each_aid_can_be_left_out() -> None:
    assert scheme(rotation=None).backward.rotation is None
    assert scheme(rotation=128).backward.tokens == 128
    assert scheme(gradients="nearest").backward.grad_wgrad == parse("nvfp4")
    assert scheme(weights="1d").backward.weight_dgrad == parse("nvfp4")
    assert scheme().backward.weight_dgrad == "same"
    assert not NVFP4Training().extras()
    assert NVFP4Training(release_forward=0.8).extras()[0].at == 0.8
