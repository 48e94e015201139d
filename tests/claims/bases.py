"""The float models that experiments share, trained by the project's own tasks and data, one per seed."""

import fcntl
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything

from qlightning.data import Digits, ImageData, StandardLibraryText
from qlightning.schedules import Cosine
from qlightning.tasks import CausalLM, Diffusion, ImageClassification

# 0.82 M parameters: configs/quickstart.yaml
LLAMA = {
    "model_type": "llama",
    **{"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 2},
    **{"max_position_embeddings": 256, "tie_word_embeddings": False},
}
VIT = {
    "model_type": "vit",
    **{"image_size": 32, "patch_size": 4, "hidden_size": 128, "intermediate_size": 256},
    **{"num_hidden_layers": 6, "num_attention_heads": 4},
}
# three stages of three basic blocks with 16, 32 and 64 channels, after the strided stem of transformers' ResNet
RESNET = {
    "model_type": "resnet",
    **{"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [3, 3, 3], "layer_type": "basic"},
}
UNET = {
    "_class_name": "UNet2DModel",
    **{"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [32, 64]},
    **{"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]},
    **{"layers_per_block": 1, "norm_num_groups": 8},
}
FLOAT_STEPS = {"llama": 900, "vit": 1500, "resnet": 1500, "unet": 900}


def task(base: str, **options: Any) -> LightningModule:
    """An untrained model."""
    if base == "llama":
        return CausalLM(LLAMA, **{"lr": 2e-3, **options})
    if base == "unet":
        return Diffusion(UNET, **{"lr": 1e-3, "samples": 0, **options})
    return ImageClassification(VIT if base == "vit" else RESNET, **{"lr": 1e-3, **options})


def data(base: str, seed: int, *, cifar: str) -> LightningDataModule:
    """What it is trained on."""
    if base == "llama":
        return StandardLibraryText(tokenizer="bytes", sequence_length=256, batch_size=16, seed=seed)
    if base == "unet":
        return Digits(batch_size=64, seed=seed)
    return ImageData(path=cifar, size=32, channels=3, flip=0.5, batch_size=128, seed=seed)


def trainer(callbacks: list[Any], steps: int, **options: Any) -> Trainer:
    return Trainer(
        max_steps=steps,
        callbacks=callbacks,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        **{"limit_val_batches": 32, "logger": False, "enable_checkpointing": False, **options},
        enable_progress_bar=False,
        enable_model_summary=False,
        devices=1,
    )


def train_float(base: str, seed: int, folder: Path, *, cifar: str) -> Path:
    """The checkpoint of the float model of a seed; trained once, by whichever process asks first."""
    path = folder / f"{base}-{seed}.ckpt"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path
        seed_everything(seed, verbose=False)
        module = task(base, schedule=Cosine(warmup=0.05))
        run = trainer([], FLOAT_STEPS[base], limit_val_batches=0)
        run.fit(module, data(base, seed, cifar=cifar))
        run.save_checkpoint(path.with_suffix(".part"), weights_only=True)
        return path.with_suffix(".part").rename(path)
