"""The switch from 16 to 1.58 bits: what changes at it, and what must not."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from qlightning import convert
from qlightning.data.loader import Loader
from qlightning.layers.convert import quantizers_of
from qlightning.methods import BitNetReloaded, ContinualTernary


def layer(norm: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8))
    convert(net, ContinualTernary(norm=norm).quantization()["rules"])
    return net[0].train()


def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, torch.ones_like(y).cumsum(0))


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_strength_zero_is_the_float_layer_and_strength_one_that_of_bitnet_reloaded(norm: str) -> None:
    linear, x = layer(norm), torch.randn(5, 16, requires_grad=True)
    other = nn.Sequential(nn.Linear(16, 8))
    other.load_state_dict({"0.weight": linear.weight, "0.bias": linear.bias})
    convert(other, BitNetReloaded(measure="mean", norm=norm).quantization()["rules"])
    for strength, expected in (
        (0.0, F.linear(F.layer_norm(x, (16,)) if norm == "layer" else x, linear.weight, linear.bias)),
        (1.0, other(x)),
    ):
        for _, quantizer in quantizers_of(linear):
            quantizer.set_strength(strength)
        y = linear(x)
        assert torch.equal(y, expected)
        wanted = (x, linear.weight, linear.bias) if strength == 0 else (x, other[0].weight, other[0].bias)
        for found, grad in zip(gradients(y, x, linear.weight, linear.bias), gradients(expected, *wanted), strict=True):
            assert torch.equal(found, grad)


def test_in_between_training_mixes_and_evaluation_does_not() -> None:
    linear, x = layer("none"), torch.randn(5, 16)
    full, w = linear.eval()(x), linear.weight.detach()
    for _, quantizer in quantizers_of(linear):
        quantizer.set_strength(0.25)
    assert torch.equal(linear.eval()(x), full)
    linear.train()
    mixed = [0.75 * t + 0.25 * q.eval()(t) for t, q in ((x, linear.input_quantizer), (w, linear.weight_quantizer))]
    linear.train()
    assert torch.allclose(linear(x), F.linear(*mixed, linear.bias), atol=1e-5)


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Look(Callback):
    """Losses, parameters and what Adam remembers of them, after every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.parameters: list[list[int]] = []
        self.counts: list[set[int]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        state = trainer.optimizers[0].state
        self.losses.append(float(outputs["loss"]))
        self.parameters.append([id(p) for p in pl_module.parameters()])
        self.counts.append({int(state[p]["step"]) for p in pl_module.parameters()})


def fit(callbacks: list[Callback], folder: Path) -> Look:
    seed_everything(0, verbose=False)
    look, g = Look(), torch.Generator().manual_seed(2)
    rows = [(torch.randn(8, generator=g), torch.randn(4, generator=g)) for _ in range(24)]
    trainer = Trainer(
        max_steps=6,
        callbacks=[*callbacks, look],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Net(), Loader(rows, batch_size=4))
    return look


@pytest.mark.parametrize(("optimizer", "counts"), [("keep", [1, 2, 3, 4, 5, 6]), ("reset", [1, 2, 3, 1, 2, 3])])
def test_until_the_switch_training_is_float_training_and_parameters_stay(
    optimizer: Any, counts: list[int], tmp_path: Path
) -> None:
    plain = fit([], tmp_path)
    switched = fit(ContinualTernary(start=3, optimizer=optimizer, norm="none").callbacks(), tmp_path)
    assert switched.losses[:3] == plain.losses[:3]
    assert all(a != b for a, b in zip(switched.losses[3:], plain.losses[3:], strict=True))
    assert all(parameters == switched.parameters[0] for parameters in switched.parameters)
    assert switched.counts == [{count} for count in counts]


def test_a_ramp_makes_the_first_step_behind_the_switch_smaller(tmp_path: Path) -> None:
    plain, at_once, ramp = (
        fit(callbacks, tmp_path)
        for callbacks in (
            [],
            ContinualTernary(start=3, norm="none").callbacks(),
            ContinualTernary(start=3, ramp=2, norm="none").callbacks(),
        )
    )
    assert ramp.losses[:3] == plain.losses[:3]
    assert 0 < abs(ramp.losses[3] - plain.losses[3]) < abs(at_once.losses[3] - plain.losses[3])
