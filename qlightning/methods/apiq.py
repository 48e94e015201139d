"""ApiQ: adapters and clipping that keep a quantized model's activations, as the beginning of fine-tuning."""

from collections.abc import Sequence
from typing import Any, Literal

from qlightning import solvers
from qlightning.layers.scheme import Scheme
from qlightning.methods.method import Method
from qlightning.numerics import Int, PerGroup, Quantizer


class ApiQ(Method):
    """Ranges of the weights' grids and LoRA are learned together, block after block, before fine-tuning begins.

    Wrap the model with PEFT first, `get_peft_model(model, LoraConfig(r=64, lora_alpha=16, target_modules=[...]))`, as
    for any fine-tuning: PEFT freezes the weights, and the fit trains the adapters from where ApiQ leaves them. In a
    model without adapters only ranges are learned, and the fit trains the weights.

    Paper: ApiQ: Finetuning of 2-Bit Quantized Large Language Model (Liao et al., EMNLP 2024, arXiv 2402.05147).

    Deviations: the paper writes the quantized weight into the weight; here the weight stays and its quantizer gives the
    same values. Ranges always contain zero. A batch is whatever the data gives, the paper's is one sequence.

    Args:
        bits: Bits of weights, with a zero point per group.
        granularity: Size of the groups of columns that share a range.
        level: Match outputs of blocks ("block", ApiQ-bw) or of single layers ("layer", ApiQ-lw).
        epochs: Passes over the calibration data for each block or layer.
        adapter_lr: Learning rate of LoRA.
        clip_lr: Learning rate of the ranges' logits.
        weight_decay: AdamW's, for both.
        target: Towards the float model's activations ("fp"), or these and the float block's on quantized ones ("both").
        batches: Number of batches of calibration data.
        start: When this happens and quantization begins, as in QATCallback.
    """

    def __init__(
        self,
        bits: int = 2,
        *,
        granularity: int = 64,
        level: Literal["block", "layer"] = "block",
        epochs: int = 20,
        adapter_lr: float = 5e-4,
        clip_lr: float = 5e-3,
        weight_decay: float = 0.1,
        target: Literal["fp", "both"] = "fp",
        batches: int = 128,
        start: int | float = 0,
    ) -> None:
        self.bits, self.granularity, self.level, self.epochs = bits, granularity, level, epochs
        self.adapter_lr, self.clip_lr, self.weight_decay = adapter_lr, clip_lr, weight_decay
        self.target, self.batches, self.start = target, batches, start

    def quantization(self) -> dict[str, Any]:
        init = solvers.ApiQ(
            level=self.level,
            epochs=self.epochs,
            adapter_lr=self.adapter_lr,
            clip_lr=self.clip_lr,
            weight_decay=self.weight_decay,
            target=self.target,
            batches=self.batches,
        )
        weight = Quantizer(Int(self.bits, symmetric=False), PerGroup(self.granularity))
        return {"weight": weight, "init": init, "start": self.start}

    def check(self, others: Sequence[Method]) -> None:
        for other in others:
            rules = other.quantization().get("rules", {}).values()
            if any(isinstance(rule, Scheme) and rule.adapter is not None for rule in rules):
                raise ValueError(
                    f"{type(other).__name__} moves adapters inside the quantizer, where ApiQ's are outside: use one of "
                    f"them, Trainer(callbacks={self!r}.callbacks())"
                )
