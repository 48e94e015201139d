"""ParetoQ against its formulas; that it trains, resumes and deploys is the contract's (tests/test_methods.py)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from qlightning.data.loader import Loader
from qlightning.methods import ParetoQ
from qlightning.numerics import PerGroup, Quantizer

LEVELS = {
    1: [-1.0, 1.0],
    1.58: [-2 / 3, 0.0, 2 / 3],
    2: [-0.75, -0.25, 0.25, 0.75],
    3: list(range(-4, 4)),
    4: list(range(-8, 8)),
}


def quantizer_of(bits: float, w: Tensor, **options: Any) -> Quantizer:
    quantizer = ParetoQ(bits, **options).quantization()["weight"]
    quantizer.build(tuple(w.shape))
    quantizer.initialize(w)
    return quantizer


def weight(rows: int = 8, columns: int = 256) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", LEVELS)
def test_values_are_the_levels_times_alpha(bits: float) -> None:
    w = 3 * weight(4, 4096)
    quantizer = quantizer_of(bits, w)
    (alpha,) = quantizer.learned()
    levels = torch.tensor(LEVELS[bits])
    with torch.no_grad():
        alpha.mul_(0.4)  # so that values saturate
    found = (quantizer(w) / alpha).detach()
    nearest = (found[..., None] - levels).abs().amin(-1)
    assert float(nearest.max()) < 1e-5
    # the lowest code of 3 and 4 bits is rare; every level is used once values saturate
    assert sorted({round(v, 3) for v in found.flatten().tolist()}) == pytest.approx(LEVELS[bits], abs=1e-3)


@pytest.mark.parametrize("bits", [1, 1.58, 2])
def test_alpha_starts_at_the_mean_or_the_maximum_of_its_row(bits: float) -> None:
    w = weight()
    (alpha,) = quantizer_of(bits, w).learned()
    expected = w.abs().mean(1, keepdim=True) if bits == 1 else w.abs().amax(1, keepdim=True)
    assert torch.allclose(alpha, expected)


@pytest.mark.parametrize("bits", [3, 4])
def test_at_the_start_three_and_four_bits_leave_the_largest_of_a_row_where_it_is(bits: int) -> None:
    w = weight()
    quantizer = quantizer_of(bits, w)
    at = w.abs().argmax(1, keepdim=True)
    assert torch.allclose(quantizer(w).gather(1, at), w.gather(1, at), rtol=1e-6)
    (alpha,) = quantizer.learned()
    assert torch.allclose(alpha, w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1))


@pytest.mark.parametrize("bits", [1, 1.58, 2])
def test_the_widths_below_three_bits_are_odd(bits: float) -> None:
    w = weight()
    quantizer = quantizer_of(bits, w)
    assert torch.equal(quantizer(-w), -quantizer(w))


@pytest.mark.parametrize("saturation", ["code", "exact"])
@pytest.mark.parametrize("count", ["tensor", "row"])
@pytest.mark.parametrize("bits", LEVELS)
def test_gradients_are_the_papers(bits: float, count: str, saturation: str) -> None:
    """Steps 1 to 3 of the algorithm, written out."""
    w = weight(5, 64)
    grad = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    quantizer = quantizer_of(bits, w, count=count, saturation=saturation)
    (alpha,) = quantizer.learned()
    with torch.no_grad():
        alpha.mul_(0.5)
    w = w.requires_grad_()
    grad_w, grad_alpha = torch.autograd.grad(quantizer(w), [w, alpha], grad)
    v = (w / alpha).detach()
    if bits == 1:
        inside, moved = v.abs() <= 1, v.sign()
    elif bits >= 3:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        inside = (v >= low) & (v <= high)
        moved = torch.where(inside, v.round() - v, v.clamp(low, high))
    else:
        outside = 0.75 if bits == 2 else 1.0 if saturation == "code" else 2 / 3
        inside = v.abs() <= 0.99
        moved = torch.where(inside, (quantizer(w) / alpha).detach() - v, outside * v.sign())
    largest = 2 ** (bits - 1) - 1 if bits >= 3 else 1
    g = ((w.numel() if count == "tensor" else w.shape[1]) * largest) ** -0.5
    assert torch.equal(grad_w, torch.where(inside, grad, 0.0))
    assert 0 < (~inside).float().mean() < 1
    assert torch.allclose(grad_alpha, g * (grad * moved).sum(1, keepdim=True), atol=1e-5)


def test_steps_learn_at_the_rate_of_the_weights_and_in_float32() -> None:
    assert ParetoQ().quantization()["scale_lr"] == 1.0
    quantizer = quantizer_of(2, weight()).bfloat16()
    (alpha,) = quantizer.learned()
    assert alpha.dtype == torch.float32


def test_groups_may_share_a_step() -> None:
    assert ParetoQ(granularity=32).quantization()["weight"].granularity == PerGroup(32)


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.58"):
        ParetoQ(1.5)
    with pytest.raises(ValueError, match="saturation"):
        ParetoQ(saturation="half")  # type: ignore[arg-type]


class Shrinks(LightningModule):
    """Every step multiplies its weight by 0.9 and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 8, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).sum() * 0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=1.0)


class Steps(DummyLogger):
    """Notes at which steps it was given the change."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def log_metrics(self, metrics: Any, step: int) -> None:  # type: ignore[override]
        self.steps += [step] if "relative_change" in metrics else []


def shrink(callbacks: list[Callback], folder: Path, **options: Any) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    trainer = Trainer(callbacks=callbacks, default_root_dir=folder, **{**quiet, **options})
    trainer.fit(Shrinks(), Loader([(torch.randn(8),) for _ in range(8)], batch_size=1))


def test_relative_change_counts_from_the_step_at_which_quantization_begins(tmp_path: Path) -> None:
    class Look(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_end(self, *args: Any) -> None:
            self.seen.append(change.latest.get("relative_change", -1.0))

    qat, change = ParetoQ(2, start=2).callbacks()
    look = Look()
    shrink([qat, change, look], tmp_path, max_steps=5)
    assert look.seen == pytest.approx([-1.0, -1.0, 0.1, 0.19, 0.271], abs=1e-5)
    assert change.latest.keys() == {"relative_change", "relative_change/net.weight"}
    change.load_state_dict(change.state_dict())
    assert change._before["net.weight"].shape == (64,)


def test_relative_change_is_logged_once_per_step_under_accumulation(tmp_path: Path) -> None:
    logger = Steps()
    shrink(ParetoQ(2).callbacks(), tmp_path, max_steps=3, accumulate_grad_batches=2, logger=logger)
    assert logger.steps == [1, 2, 3]
