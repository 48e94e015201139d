"""The float models that experiments share, one per seed, trained by the configs of configs/float."""

import fcntl
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningDataModule, LightningModule, Trainer

import qlightning.data
import qlightning.tasks
from qlightning.cli import main

CONFIGS = Path(__file__).parents[2] / "configs" / "float"


@cache
def config(base: str) -> dict[str, Any]:
    """What configs/float/<base>.yaml says."""
    given: dict[str, Any] = yaml.safe_load((CONFIGS / f"{base}.yaml").read_text())
    return given


def task_class(base: str) -> type[LightningModule]:
    kind: type[LightningModule] = getattr(qlightning.tasks, config(base)["model"]["class_path"].rpartition(".")[2])
    return kind


def task(base: str, **options: Any) -> LightningModule:
    """An untrained model."""
    return task_class(base)(**{**config(base)["model"]["init_args"], **options})


def data(base: str, seed: int, *, cifar: str) -> LightningDataModule:
    """What it is trained on."""
    given = config(base)["data"]
    kind = getattr(qlightning.data, given["class_path"].rpartition(".")[2])
    where = {"path": cifar} if "path" in given["init_args"] else {}
    made: LightningDataModule = kind(**{**given["init_args"], **where, "seed": seed})
    return made


def trainer(callbacks: list[Any], steps: int) -> Trainer:
    """What trains the arms."""
    return Trainer(
        max_steps=steps,
        callbacks=callbacks,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        limit_val_batches=32,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        devices=1,
    )


def train_float(base: str, seed: int, folder: Path, *, cifar: str) -> Path:
    """The checkpoint of the float model of a seed; trained once, by whichever process asks first."""
    path = folder / f"{base}-{seed}.ckpt"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            runs = folder / f"{base}-{seed}"
            shutil.rmtree(runs, ignore_errors=True)  # of a run that was stopped
            words = ["fit", "--config", str(CONFIGS / f"{base}.yaml"), f"--seed_everything={seed}"]
            words += [f"--data.seed={seed}", f"--trainer.logger.save_dir={runs}", "--trainer.enable_progress_bar=false"]
            main(words + ([f"--data.path={cifar}"] if "path" in config(base)["data"]["init_args"] else []))
            (last,) = runs.rglob("last.ckpt")
            last.rename(path)
        return path
