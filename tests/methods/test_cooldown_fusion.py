"""Cooldown fusion: the plan, one peak, and a decay that begins with quantization and joins without a jump."""

import itertools

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from qlightning.callbacks.qat import QATCallback
from qlightning.data.loader import Loader
from qlightning.evaluation.scaling_law import plan_qat
from qlightning.methods import CooldownFusion, Quantization, compose
from qlightning.schedules import Cosine
from qlightning.tasks.optimizer import adamw


class Scheduled(LightningModule):
    """Complete when it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = Cosine()
        self.layer = nn.Linear(8, 8)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return adamw(self, self.schedule, lr=0.5, betas=(0.9, 0.95), weight_decay=0.0)


class Late(Scheduled):
    """Converted only after every callback's setup."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = None

    def configure_model(self) -> None:
        if self.layer is None:
            self.layer = nn.Linear(8, 8)


class Rates(Callback):
    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_start(self, trainer, module, *args) -> None:
        quantized = module.layer.weight_quantizer.enabled
        self.seen.append((trainer.optimizers[0].param_groups[0]["lr"] / 0.5, quantized))


def fit(module, *callbacks, steps=20):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Loader(torch.randn(4 * steps, 8), batch_size=4))


@pytest.mark.parametrize("kind", [Scheduled, Late])
def test_one_peak_and_the_decay_begins_with_quantization(kind: type[Scheduled]) -> None:
    rates, module = Rates(), kind()
    fit(module, *CooldownFusion(start=0.6, weight="int4-channel", warmup=4).callbacks(), rates)
    values, quantized = zip(*rates.seen, strict=True)
    assert quantized == (False,) * 12 + (True,) * 8
    assert values[4:13] == (1.0,) * 9
    assert all(a < b for a, b in itertools.pairwise(values[:5]))
    assert values[12:] == pytest.approx([1 - k / 8 for k in range(8)])
    assert isinstance(module.schedule, Cosine)  # the module's own is back


def test_the_moment_is_planned() -> None:
    method = CooldownFusion(bits=4, params=86e6, tokens=2e9, weight="int4-channel")
    plan = plan_qat(params=86e6, tokens=2e9, bits=4)
    assert method.begins() == plan.start == pytest.approx(1 - 0.173, abs=5e-4)
    assert CooldownFusion(bits=2, params=86e6, tokens=2e9).begins() < method.begins()
    assert method.callbacks()[0].start == plan.start
    assert CooldownFusion(start=0.7, params=86e6, tokens=2e9).begins() == 0.7
    with pytest.raises(ValueError, match=r"CooldownFusion\(bits=4, params=86e6, tokens=2e9\), or say it"):
        CooldownFusion().callbacks()


def test_it_leaves_the_quantizers_to_others_and_the_moment_to_itself() -> None:
    qat, _ = compose(Quantization(weight="int3-channel-lsq"), CooldownFusion(start=0.8))
    assert isinstance(qat, QATCallback)
    assert qat.start == 0.8
    with pytest.raises(ValueError, match=r"start=0\.5 .* start=0\.8"):
        compose(Quantization(weight="int4", start=0.5), CooldownFusion(start=0.8))


def test_a_module_without_a_schedule_is_told_how() -> None:
    class Plain(Scheduled):
        def __init__(self) -> None:
            super().__init__()
            del self.schedule

    with pytest.raises(ValueError, match=r"Plain keeps 0 learning rate schedules .* self\.schedule = Constant\(\)"):
        fit(Plain(), *CooldownFusion(start=0.5, weight="int4-channel").callbacks(), steps=2)


def test_alone_it_says_what_it_is_fused_with() -> None:
    alone = [
        callback
        for callback in CooldownFusion(start=2, weight="int4-channel").callbacks()
        if not isinstance(callback, QATCallback)
    ]
    with pytest.raises(ValueError, match=r"no QATCallback whose start.*CooldownFusion\(\)\.callbacks\(\)"):
        Trainer(max_steps=4, callbacks=alone, logger=False).fit(Scheduled(), Loader([torch.randn(8)] * 4, batch_size=1))
