"""Inputs quantized from the start and flat outputs, each alone and together, then W4A4 (arXiv 2404.03605)."""

from typing import Any

from claim import Arm, Claim, Numbers, mean

from qlightning.callbacks.phase import Phase
from qlightning.layers.convert import quantizers_of
from qlightning.methods import ActivationRegularization, Quantization

STEPS = 300
# where weights, and inputs that were float, are rounded: the rate has decayed to less than a hundredth
LATE = STEPS - 12


def arm(*, inputs: bool, penalty: float, metric: Any = None) -> Arm:
    def callbacks() -> list[Any]:
        method = ActivationRegularization(weight=penalty)
        rounded = Phase(LATE, quantize=["weight"] if inputs else ["weight", "input"])
        schedule = [Phase(0, quantize="input"), rounded] if inputs else [rounded]
        quantization = Quantization(weight="int4", input=method.quantization()["input"], schedule=schedule)
        return [*quantization.callbacks(), *(method.extras() if penalty else [])]

    return Arm(callbacks, metric=metric)


def cost(module: Any, trainer: Any, data: Any) -> float:
    """Held-out loss with rounded weights less that with float weights, inputs quantized in both."""
    (rounded,) = trainer.validate(module, data, verbose=False)
    for name, quantizer in quantizers_of(module):
        if name.endswith("weight_quantizer"):
            quantizer.enabled = False
    (plain,) = trainer.validate(module, data, verbose=False)
    return float(rounded["val_loss"] - plain["val_loss"])


def both_are_needed(numbers: Numbers) -> bool:
    return mean(numbers["both"]) < min(mean(numbers[arm]) for arm in ("neither", "inputs", "penalty"))


def inputs_burden_weights(numbers: Numbers) -> bool:
    neither, inputs, both = (mean(numbers[arm]) for arm in ("neither", "inputs", "both"))
    return inputs > neither and both < inputs


CLAIMS = [
    Claim(
        name="activation_regularization",
        says="Rounded to W4A4 at the end of pretraining, the model with quantized inputs and the penalty on outputs is "
        "best; either half alone is worse. (Outlier channels grow with size and training: at this size the halves may "
        "not show. Penalty 1e-5 is second-hand.)",
        base="llama-scratch",
        arms={
            "neither": arm(inputs=False, penalty=0.0),
            "inputs": arm(inputs=True, penalty=0.0),
            "penalty": arm(inputs=False, penalty=1e-5),
            "both": arm(inputs=True, penalty=1e-5),
            "both, a tenth of the penalty": arm(inputs=True, penalty=1e-6),
        },
        holds=both_are_needed,
        expected="both < neither, inputs and penalty",
        steps=STEPS,
        lr=2e-3,
    ),
    Claim(
        name="activation_regularization-weights",
        says="Quantized inputs alone move the difficulty into the weights, and the penalty closes that way.",
        base="llama-scratch",
        arms={
            "neither": arm(inputs=False, penalty=0.0, metric=cost),
            "inputs": arm(inputs=True, penalty=0.0, metric=cost),
            "both": arm(inputs=True, penalty=1e-5, metric=cost),
        },
        holds=inputs_burden_weights,
        expected="inputs > neither; both < inputs",
        metric="val_loss, rounded weights less float ones",
        steps=STEPS,
        lr=2e-3,
    ),
]
