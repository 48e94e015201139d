"""EfficientDM against its card: PTQ at the start, exact merges, the sampler's own rows, learning rates by scale."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qlightning import Scheme, convert, restore
from qlightning.adapters import LoRA
from qlightning.layers.layer import Twin
from qlightning.methods import EfficientDM
from qlightning.methods.efficientdm import ScaleAwareRates, TrajectoryDistillation, float_model, set_rates
from qlightning.numerics.conditioned import StepTable, conditioned, publish
from qlightning.tasks import Diffusion

UNET = {
    "_class_name": "UNet2DModel",
    **{"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 8]},
    **{"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]},
    **{"layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4, "num_class_embeds": 4},
}
EIGHT = ["conv_in", "conv_out"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*num_workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]


def unet() -> Any:
    torch.manual_seed(0)
    task = Diffusion(UNET, samples=0)
    task.configure_model()
    return task


def teacher() -> Any:
    """The float model in eval mode, its weights without gradients, as weights under adapters are.

    What a fresh model computes differs from it in the last bits: of a weight that requires a gradient torch multiplies
    a strided (batch, tokens, features) input as one matrix and else batch by batch, also where no gradient is made; and
    diffusers' UNet lays out the inputs of its shortcuts anew in training mode.
    """
    return unet().requires_grad_(False).eval()


def settled(model: nn.Module, rules: dict[str, Scheme]) -> nn.Module:
    """Converted, with input tables from one batch."""
    convert(model, rules)
    tables = list(conditioned(model))
    for module in model.modules():
        if isinstance(module, Twin) and (quantizer := module.quantizer("input")) is not None:
            quantizer.enabled, quantizer.observing = False, True
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    model(x, torch.tensor([500, 20]), torch.tensor([1, 2]))
    for table in tables:
        table.settle()
    for module in model.modules():
        if isinstance(module, Twin) and (quantizer := module.quantizer("input")) is not None:
            quantizer.enabled, quantizer.observing = True, False
    return model


def predict(model: nn.Module) -> Tensor:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return model(x, torch.tensor([3, 871]), torch.tensor([0, 3]))


def test_the_start_is_the_ptq_model_and_merging_changes_no_bit() -> None:
    rules = EfficientDM(rank=4, steps=10, eight_bit=EIGHT).quantization()["rules"]
    adapted, ptq = unet(), unet()
    settled(adapted, rules)
    settled(ptq, {name: Scheme(scheme.weight, input=scheme.input) for name, scheme in rules.items()})
    assert torch.equal(predict(adapted), predict(ptq))
    assert sum(isinstance(m, LoRA) for m in adapted.modules()) > 10
    assert not isinstance(adapted.model.conv_in._modules.get("adapter"), LoRA)
    assert adapted.model.conv_in.weight_quantizer.format.bits == 8

    for adapter in (m for m in adapted.modules() if isinstance(m, LoRA)):
        nn.init.normal_(adapter.b, std=0.02)
    trained = predict(adapted)
    assert not torch.equal(trained, predict(ptq))
    scales = {n: p for n, p in adapted.state_dict().items() if "_quantizer." in n}
    merged = restore(copy.deepcopy(adapted))
    convert(merged, {name: Scheme(scheme.weight, input=scheme.input) for name, scheme in rules.items()})
    merged.load_state_dict(scales, strict=False)
    assert torch.equal(predict(merged), trained)


def test_with_its_quantizers_off_the_module_is_the_float_model() -> None:
    adapted, plain = unet().train(), teacher()
    settled(adapted, EfficientDM(rank=4, steps=10).quantization()["rules"])
    for adapter in (m for m in adapted.modules() if isinstance(m, LoRA)):
        nn.init.normal_(adapter.b, std=0.1)
    before = predict(adapted)
    with float_model(adapted):
        assert torch.equal(predict(adapted), predict(plain))
        assert not adapted.training
    assert adapted.training
    assert adapted.model.training
    assert torch.equal(predict(adapted), before)


class Seen(Callback):
    """The rows that every table used in training, and what was trained on."""

    def __init__(self) -> None:
        self.rows: list[set[int]] = []
        self.losses: list[float] = []
        self.rates: list[list[float]] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups if group["params"]])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        tables = [scale for scale in conditioned(pl_module) if isinstance(scale, StepTable)]
        self.rows.append({row for table in tables for row in table.row(2).tolist()})
        self.losses.append(float(outputs["loss"]))


def fit(folder: Path, *, steps: int = 6, callbacks: list[Any] | None = None) -> tuple[Any, Seen, list[Any]]:
    callbacks = callbacks or EfficientDM(rank=2, steps=4, calibration=2, eight_bit=EIGHT).callbacks()
    images = [{"image": torch.zeros(1, 8, 8), "label": torch.tensor(i % 3)} for i in range(2 * steps)]
    module, seen = unet(), Seen()
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[*callbacks, seen],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(images, batch_size=2))
    return module, seen, callbacks


def test_a_run_follows_the_teachers_trajectory(tmp_path: Path) -> None:
    module, seen, callbacks = fit(tmp_path)
    assert seen.rows == [{3}, {2}, {1}, {0}, {3}, {2}]  # the sampler's steps, from much noise to little
    before = dict(unet().named_parameters())
    for name, parameter in module.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name
    moved = [n for n, p in module.named_parameters() if n.endswith("adapter.b") and bool(p.any())]
    assert len(moved) > 10
    assert "training_step" not in vars(module)

    # the images are those of the float model alone, by diffusers' own sampler
    trajectory = next(c for c in callbacks if isinstance(c, TrajectoryDistillation))
    sampler = DDIMScheduler.from_config(module.process.scheduler.config, clip_sample=False)
    sampler.set_timesteps(4)
    plain, x = teacher(), None
    for done in range(6):
        generator = torch.Generator().manual_seed(1_000_003 + 7_919 * done)
        if done % 4 == 0:
            x, labels = torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([(2 * done) % 3, (2 * done + 1) % 3])
        t = sampler.timesteps[done % 4]
        with torch.no_grad():
            noise = plain(x, t.expand(2), labels)
        x = sampler.step(noise, t, x, eta=1.0, generator=generator).prev_sample
    assert torch.equal(trajectory._images, x)


def test_a_second_run_begins_a_trajectory_of_its_own(tmp_path: Path) -> None:
    """As a run by new callbacks does; only a resumed run goes on with the images it had."""
    callbacks = EfficientDM(rank=2, steps=4, calibration=2, eight_bit=EIGHT).callbacks()
    runs = [fit(tmp_path, steps=3, callbacks=callbacks)[1] for _ in range(2)]
    assert runs[0].rows == runs[1].rows == [{3}, {2}, {1}]
    assert runs[0].losses == runs[1].losses


def test_a_layers_adapter_learns_at_the_mean_of_its_steps_over_2500(tmp_path: Path) -> None:
    _, seen, _ = fit(tmp_path, steps=3)
    fresh = unet()
    convert(fresh, EfficientDM(rank=2, steps=4, eight_bit=EIGHT).quantization()["rules"])
    layers = [m for m in fresh.modules() if isinstance(m, Twin) and isinstance(m._modules.get("adapter"), LoRA)]
    expected = {float(layer.weight_quantizer.scale.value.detach().abs().mean()) / 2500 for layer in layers}
    assert seen.rates[0]
    for rate in expected | {1e-6, 5e-4}:
        assert any(rate == pytest.approx(other, rel=1e-4) for other in seen.rates[0]), rate


def test_groups_keep_the_course_of_their_schedule() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([a, b], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    set_rates(optimizer, [schedule], {b: 0.1})
    for expected in (1.0, 0.75, 0.5):
        rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates[a] == pytest.approx(expected)
        assert rates[b] == pytest.approx(0.1 * expected)
        optimizer.step()
        schedule.step()


def test_guidance_is_in_both_predictions() -> None:
    task = unet()
    trajectory = TrajectoryDistillation(4, guidance=1.5, null_label=3)
    trajectory._labels = torch.tensor([0, 1])
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        steps = torch.tensor([9, 9])
        without, given = task(x, steps, torch.tensor([3, 3])), task(x, steps, torch.tensor([0, 1]))
        assert torch.allclose(trajectory._noise(task, x, 9), without + 1.5 * (given - without), atol=1e-5)
    with pytest.raises(ValueError, match="null_label"):
        TrajectoryDistillation(4, guidance=1.5)


def test_what_it_cannot_run_on_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="noise_scheduler"):
        TrajectoryDistillation(4, sampler="nothing.here")._sampler(unet())
    trainer = Trainer(accelerator="cpu", logger=False, accumulate_grad_batches=2, enable_progress_bar=False)
    with pytest.raises(ValueError, match="accumulate_grad_batches=1"):
        TrajectoryDistillation(4).on_fit_start(trainer, unet())
    assert ScaleAwareRates().divisor == 2500
    publish(unet(), 3)  # nothing to tell
