"""The checks of the MatQuant card (S116)."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qlightning import convert
from qlightning.methods import MatQuant
from qlightning.methods.matquant import NestedLosses, Sliced, set_bits
from qlightning.numerics import PerChannel, Quantizer, parse

CODES = torch.arange(256, dtype=torch.float32) - 128


def unsigned(bits: int, *, extra: bool = False) -> Tensor:
    return Sliced(bits, extra=extra).snap(CODES.clone(), torch.round) + 128


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_a_slice_is_the_cards_formula(bits: int) -> None:
    unit = 2 ** (8 - bits)
    expected = [min(int(q / unit + 0.5), 2**bits - 1) * unit for q in range(256)]
    assert unsigned(bits).tolist() == expected
    assert set(expected) == {v + 128 for v in Sliced(bits).values()}


def test_all_eight_bits_are_the_code_itself() -> None:
    assert torch.equal(unsigned(8), CODES + 128)
    w = torch.randn(4, 32)
    assert torch.equal(Quantizer(Sliced(8), PerChannel())(w), parse("int8-asym")(w))


@pytest.mark.parametrize("bits", [2, 4])
def test_a_slice_of_a_slice_is_itself(bits: int) -> None:
    once = Sliced(bits).snap(CODES.clone(), torch.round)
    assert torch.equal(Sliced(bits).snap(once.clone(), torch.round), once)


def test_slicing_twice_differs_on_24_of_256_codes() -> None:
    twice = Sliced(2).snap(Sliced(4).snap(CODES.clone(), torch.round), torch.round) + 128
    assert int((twice != unsigned(2)).sum()) == 24


@pytest.mark.parametrize(("bits", "overflowing"), [(2, 32), (4, 8)])
def test_the_extra_code_is_where_values_carry(bits: int, overflowing: int) -> None:
    assert int((unsigned(bits, extra=True) == 256).sum()) == overflowing
    assert Sliced(bits, extra=True).bits == bits + 1


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lower_bits_keep_the_stored_scale_and_zero_point(bits: int) -> None:
    w = torch.randn(4, 32)
    stored, sliced = Quantizer(Sliced(8), PerChannel()), Quantizer(Sliced(bits), PerChannel())
    grid = stored.grid(w)
    expected = (Sliced(bits).snap(w / grid.scale + grid.zero_point, torch.round) - grid.zero_point) * grid.scale
    assert torch.equal(sliced(w), expected)
    assert torch.equal(sliced.dequantize(sliced.quantize(w), w.dtype), sliced(w))


def test_wrong_bits_name_right_ones() -> None:
    with pytest.raises(ValueError, match=r"Sliced\(4\)"):
        Sliced(9)
    with pytest.raises(ValueError, match="falling"):
        MatQuant(bits=(2, 8), weights=(1.0, 1.0))


class Net(LightningModule):
    """Regression by one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self(batch) - batch[:, :4]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(callbacks: list, steps: int = 1) -> Net:
    module = Net()
    trainer = Trainer(
        max_steps=steps,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, DataLoader(rows, batch_size=4))
    return module


def test_the_gradient_of_the_sum_is_the_sum_of_the_gradients() -> None:
    """One SGD step with all precisions moves weights by the weighted sum of what each alone moves them."""
    weights = {8: 0.3, 4: 0.5, 2: 1.0}
    together = train(MatQuant(tuple(weights), tuple(weights.values())).callbacks())
    start = Net()
    moved = {name: torch.zeros_like(p) for name, p in start.named_parameters()}
    batch = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))[:4]
    for bits, weight in weights.items():
        alone = Net()
        convert(alone, Quantizer(Sliced(bits), PerChannel()))
        alone.training_step(batch, 0).backward()
        for name, p in alone.named_parameters():
            moved[name] -= 0.1 * weight * p.grad
    for name, p in start.named_parameters():
        after = dict(together.named_parameters())[name]
        assert torch.allclose(after - p, moved[name], atol=1e-6), name


def test_codistillation_changes_what_lower_bits_learn() -> None:
    plain, distilled = (train(MatQuant(codistill=share).callbacks(), 2) for share in (0.0, 0.7))
    assert not torch.equal(plain.net[0].weight, distilled.net[0].weight)


def test_bits_are_chosen_by_layer_after_training() -> None:
    module = train(MatQuant().callbacks())
    assert set_bits(module, {"*": 4, "net.2": 2}) == {"net.0": 4, "net.2": 2}
    w = module.net[2].weight
    assert torch.equal(module.net[2].weight_quantizer(w), Quantizer(Sliced(2), PerChannel())(w))
    with pytest.raises(ValueError, match="matches no layer"):
        set_bits(module, {"*": 4, "nothing": 2})


def test_nested_losses_need_nested_weights() -> None:
    with pytest.raises(ValueError, match="MatQuant"):
        train([NestedLosses({8: 1.0, 2: 1.0})])
    with pytest.raises(ValueError, match="MatQuant"):
        set_bits(nn.Linear(2, 2), 4)
