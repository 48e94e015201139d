"""Forward-only training between rounding and training with gradients (arXiv 2509.00031)."""

from typing import Any

from claim import Arm, Claim, ascending
from lightning.pytorch import Callback, LightningModule, Trainer

from qlightning.methods import Quantization, ZeroQAT

SCHEME = ZeroQAT(bits=3, input_bits=8).quantization()


class WithoutClipping(Callback):
    """There are no gradients to clip."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.gradient_clip_val = None


def forward_only(lr: float) -> list[Any]:
    return [WithoutClipping(), *ZeroQAT(bits=3, input_bits=8, lr=lr, eps=3e-3).callbacks()]


CLAIMS = [
    Claim(
        name="zeroqat",
        says="W3A8 of a trained model: forward passes alone gain on rounding, gradients gain more (card S28).",
        base="llama",
        arms={
            "rounding": Arm(Quantization(**SCHEME).callbacks, steps=0),
            "forward only": Arm(lambda: forward_only(1e-6)),
            "forward only, lr 1e-5": Arm(lambda: forward_only(1e-5)),
            "straight-through": Arm(Quantization(**SCHEME).callbacks, steps=200),
        },
        holds=ascending("straight-through", "forward only", "rounding"),
        expected="straight-through < forward only < rounding",
        steps=2000,
    ),
]
