"""ApiQ's beginning of fine-tuning against LoRA at zero and LoftQ (arXiv 2402.05147)."""

from typing import Any

import torch
from claim import Arm, Claim, Numbers, ascending, mean
from l4q_claim import with_lora

from qlightning import QATCallback
from qlightning.methods import ApiQ
from qlightning.numerics import parse

WEIGHT = "int2-asym-g32"
# an eighth of the paper's updates per block, at higher rates: 5e-4 and 5e-3 there
METHOD = ApiQ(2, granularity=32, epochs=20, batches=16, adapter_lr=2e-3, clip_lr=2e-2)


@torch.no_grad()
def with_loftq(task: Any, *, rounds: int = 5) -> Any:
    """Weight and LoRA by turns: Q = round(W - BA), BA = the best of its rank for W - Q (alternating, from memory)."""
    from peft.tuners.lora import Linear

    task = with_lora(task)
    for layer in [module for module in task.modules() if isinstance(module, Linear)]:
        weight = layer.base_layer.weight
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        quantizer = parse(WEIGHT)
        quantizer.build(weight.shape)
        target, codes = weight.clone(), weight
        for _ in range(rounds):
            codes = quantizer(target - b @ a)
            left, singular, right = torch.linalg.svd(target - codes, full_matrices=False)
            root = singular[: len(a)].sqrt()
            b.copy_(left[:, : len(a)] * root)
            a.copy_(root[:, None] * right[: len(a)])
        weight.copy_(codes)  # on its grid, so that rounding once more does not move it
    return task


def arms() -> dict[str, Arm]:
    return {
        "lora at zero": Arm(lambda: [QATCallback(weight=WEIGHT)], module=with_lora),
        "loftq": Arm(lambda: [QATCallback(weight=WEIGHT)], module=with_loftq),
        "apiq": Arm(METHOD.callbacks, module=with_lora),
    }


def lowest(numbers: Numbers) -> bool:
    return mean(numbers["apiq"]) < min(mean(numbers["loftq"]), mean(numbers["lora at zero"]))


CLAIMS = [
    Claim(
        name="apiq-start",
        says="Two bits in groups before any fine-tuning: ApiQ keeps what the model computes, where LoRA at zero "
        "(QLoRA) does nothing and LoftQ fits weights. Told by the held-out loss, in place of the blocks' activations.",
        base="llama",
        arms=arms(),
        holds=ascending("apiq", "loftq", "lora at zero"),
        expected="apiq < loftq < lora at zero",
        steps=0,
    ),
    Claim(
        name="apiq",
        says="After the same fine-tuning of adapters, ApiQ's beginning still ends lowest.",
        base="llama",
        arms=arms(),
        holds=lowest,
        expected="apiq < loftq and lora at zero",
        lr=1e-3,
    ),
]
