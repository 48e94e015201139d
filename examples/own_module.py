"""Quantization-aware training of a LightningModule that knows nothing of quantization.

    python examples/own_module.py [--steps 400]

A multilayer perceptron on scikit-learn's digits: float until the middle of the run, then 2-bit weights with learned
scales under 8-bit inputs. Prints the accuracy before, at and after the switch, and loads the checkpoint again.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from qlightning import QATCallback
from qlightning.data import Digits


class Perceptron(LightningModule):
    """Yours: no base class of ours, no hook, no option."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10)
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch["image"]), batch["label"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        correct = self(batch["image"]).argmax(1) == batch["label"]
        self.log("val_accuracy", correct.float().mean(), batch_size=len(correct))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    module, digits = Perceptron(), Digits(batch_size=64)
    qat = QATCallback("int2-g32-lsq", "int8-token", start=0.5, rules={"net.5": "int8"})
    trainer = Trainer(
        max_steps=steps,
        callbacks=[qat],
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        default_root_dir="runs",
    )
    trainer.fit(module, digits)
    trained = trainer.validate(module, digits, verbose=False)[0]["val_accuracy"]
    path = trainer.checkpoint_callback.best_model_path
    loaded = Perceptron.load_from_checkpoint(path)  # converts itself: the checkpoint says how
    again = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False).validate(loaded, digits, verbose=False)
    print(f"accuracy with 2-bit weights: {trained:.3f}; loaded from {path}: {again[0]['val_accuracy']:.3f}")


if __name__ == "__main__":
    main()
