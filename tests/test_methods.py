"""The contract of the catalogue: every method, with its paper's own values, trains, resumes and deploys.

Methods are found by the folder and their YAML by the glob; nothing here names one.
"""

from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from qlightning.data.loader import Loader
from qlightning.layers.convert import quantizers_of
from qlightning.layers.layer import Twin
from qlightning.methods import Method, compose
from qlightning.methods.catalogue import catalogue, find
from qlightning.tasks import CausalLM, Diffusion, ImageClassification

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))
STEPS, RESUMED, SAVED = 12, 8, 4  # most methods switch in the middle, at step 6

# Widths of 128, so that the papers' group sizes divide them.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {"model_type": "llama", "max_position_embeddings": 32, "vocab_size": 32, **WIDE}
VIT = {"model_type": "vit", "image_size": 8, "patch_size": 4, "num_channels": 1, **WIDE}
UNET = {
    "_class_name": "UNet2DModel",
    **{"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [32, 32]},
    **{"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]},
    **{"layers_per_block": 1, "norm_num_groups": 4},
}


class Rows(LightningDataModule):
    """Random rows in a fixed order, the same in every run: six batches, which solvers read all of."""

    def __init__(self, domain: str) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        if domain == "text":
            self.rows: list[dict[str, Any]] = [{"input_ids": torch.randint(32, (16,), generator=g)} for _ in range(12)]
        else:
            image = [torch.rand((1, 8, 8), generator=g) * 2 - 1 for _ in range(12)]
            self.rows = [{"image": row, "label": torch.randint(3, (), generator=g)} for row in image]
        self.vocab_size, self.num_classes = 32, 3

    def train_dataloader(self) -> Loader:
        return Loader(self.rows, batch_size=2)

    val_dataloader = train_dataloader


def task(domain: str) -> LightningModule:
    if domain == "text":
        return CausalLM(LLAMA)
    return ImageClassification(VIT) if domain == "images" else Diffusion(UNET, samples=0)


def load(path: Path) -> Method | list[Method]:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--method", type=Method | list[Method])
    return parser.instantiate(parser.parse_path(path)).method


class Record(Callback):
    """Losses, and which trainable parameters ever had a gradient."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.with_gradient: set[str] = set()
        self.trainable: set[str] = set()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self.losses[trainer.global_step] = float(outputs["loss"])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = {n: p for n, p in pl_module.named_parameters() if p.requires_grad and id(p) in stepped}
        self.trainable |= set(named)
        self.with_gradient |= {n for n, p in named.items() if p.grad is not None and bool(p.grad.isfinite().all())}


def fit(path: Path, folder: Path, *, resume: Path | None = None) -> tuple[LightningModule, Record, Method]:
    seed_everything(0, verbose=False)
    methods = load(path)
    methods = methods if isinstance(methods, list) else [methods]
    record, module = Record(), task(methods[0].domain)
    every = ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=SAVED, save_top_k=-1, save_on_train_epoch_end=False
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        callbacks=[*compose(*methods), record, every],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
    )
    trainer.fit(module, Rows(methods[0].domain), ckpt_path=resume)
    return module, record, methods[0]


def outputs(module: LightningModule, domain: str) -> torch.Tensor:
    module.eval()
    batch = next(iter(Rows(domain).val_dataloader()))
    torch.manual_seed(3)
    with torch.no_grad():
        if domain == "text":
            return module(batch["input_ids"])
        if domain == "images":
            return module(batch["image"])
        return module.model(batch["image"], torch.tensor([3, 7])).sample


def deployed_on_grid(module: nn.Module) -> int:
    """Asserts that every quantized weight is what its stored codes mean; returns how many there are."""
    module.eval()
    checked = 0
    for layer in module.modules():
        if not isinstance(layer, Twin):
            continue
        for prefix, weight in layer.weights().items():
            quantizer, inside = layer.quantizer(prefix), layer.inside()
            if quantizer is None or not quantizer.enabled:
                continue
            assert hasattr(quantizer, "quantize"), f"{quantizer!r} cannot be stored"
            matrix = weight.detach()
            if inside is not None:
                matrix = inside.effective(matrix, [t.detach() for t in inside.tensors()])
            assert torch.equal(quantizer.dequantize(quantizer.quantize(matrix), matrix.dtype), quantizer(matrix))
            checked += 1
    return checked


def test_every_method_has_a_config_and_every_config_a_method() -> None:
    loaded = {path.stem: load(path) for path in CONFIGS}
    named = {stem: type(m[0] if isinstance(m, list) else m).__name__ for stem, m in loaded.items()}
    assert sorted(named.values()) == sorted(entry.name for entry in catalogue())
    assert {entry.module for entry in catalogue()} == set(named)


@pytest.mark.parametrize("name", [entry.name for entry in catalogue()])
def test_a_methods_docstring_and_arguments_describe_it(name: str) -> None:
    method = find(name)
    assert "Paper: " in (method.__doc__ or "")
    assert "arXiv" in (method.__doc__ or "")
    assert not getattr(method, "__abstractmethods__", None)
    built = method()
    assert eval(repr(built), {name: method, "None": None}) == built


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_method_trains_resumes_and_deploys(path: Path, tmp_path: Path) -> None:
    module, record, method = fit(path, tmp_path)
    assert len(record.losses) == STEPS
    assert all(torch.isfinite(torch.tensor(list(record.losses.values()))))
    assert record.trainable
    assert not method.backward or record.with_gradient == record.trainable, sorted(
        record.trainable - record.with_gradient
    )

    _, resumed, _ = fit(path, tmp_path, resume=tmp_path / f"step={RESUMED}.ckpt")
    assert resumed.losses == {step: loss for step, loss in record.losses.items() if step > RESUMED}

    loaded = type(module).load_from_checkpoint(tmp_path / f"step={STEPS}.ckpt", map_location="cpu")
    assert torch.equal(outputs(loaded, method.domain), outputs(module, method.domain))
    if method.deploys and any(True for _ in quantizers_of(module)):
        assert deployed_on_grid(module) > 0
