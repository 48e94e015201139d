"""L4Q against LoRA outside the quantizer that is merged and rounded (arXiv 2402.04902)."""

from typing import Any

from claim import Arm, Claim, ascending

from qlightning import QATCallback
from qlightning.methods import L4Q


def with_lora(task: Any) -> Any:
    """The task's model as PEFT wraps it."""
    from peft import LoraConfig, get_peft_model

    task.configure_model()
    task.model = get_peft_model(task.model, LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"))
    return task


def merged(task: Any, trainer: Any, data: Any) -> float:
    """Held-out loss of the integer model: the adapter is added to the weight, and the sum is rounded."""
    task.model = task.model.merge_and_unload()
    (metrics,) = trainer.validate(task, data, verbose=False)
    return float(metrics["val_loss"])


CLAIMS = [
    Claim(
        name="l4q",
        says="3 bits: LoRA inside the quantizer beats LoRA beside it once both are integers (table 2).",
        base="llama",
        arms={
            "rounding": Arm(L4Q(3, granularity=64).callbacks, steps=0, module=with_lora),
            "outside, merged, rounded": Arm(lambda: [QATCallback("int3-asym-g64")], module=with_lora, metric=merged),
            "l4q": Arm(L4Q(3, granularity=64).callbacks, module=with_lora),
        },
        holds=ascending("l4q", "outside, merged, rounded", "rounding"),
        expected="l4q < outside, merged, rounded < rounding",
        lr=2e-3,
    ),
]
