"""Forward-only training between rounding and training with gradients (arXiv 2509.00031)."""

from typing import Any

from claim import Arm, Claim, Numbers, mean
from lightning.pytorch import Callback, LightningModule, Trainer

from qlightning.methods import Quantization, ZeroQAT

SCHEME = ZeroQAT(bits=3, input_bits=8, alpha=None).quantization()
RATES = (1e-6, 1e-5)


class WithoutClipping(Callback):
    """There are no gradients to clip."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.gradient_clip_val = None


def forward_only(lr: float) -> list[Any]:
    return [WithoutClipping(), *ZeroQAT(bits=3, input_bits=8, alpha=None, lr=lr, eps=3e-3).callbacks()]


def both_gain(numbers: Numbers) -> bool:
    forward = min(mean(numbers[f"forward only, lr {rate:g}"]) for rate in RATES)
    return mean(numbers["straight-through"]) < forward < mean(numbers["rounding"])


CLAIMS = [
    Claim(
        name="zeroqat",
        says="W3A8 of a trained model: forward passes alone gain on rounding, gradients gain more (card S28). "
        "Without the transformation that the method learns first.",
        base="llama",
        arms={
            "rounding": Arm(Quantization(**SCHEME).callbacks, steps=0),
            **{f"forward only, lr {rate:g}": Arm(lambda rate=rate: forward_only(rate)) for rate in RATES},
            "straight-through": Arm(Quantization(**SCHEME).callbacks, steps=200),
        },
        holds=both_gain,
        expected="straight-through < the best forward only < rounding",
        steps=2000,
    ),
]
