"""FP4 training: the gradient estimator and the compensation of outliers (arXiv 2501.17116)."""

from claim import Arm, Claim, Numbers, ascending, mean

from qlightning.methods import FP4Training

RATES = (1e-3, 2e-3, 4e-3)


def best(numbers: Numbers, gradient: str) -> float:
    """The lowest mean over learning rates: the estimator is also a change of rate."""
    return min(mean(numbers[f"{gradient} at {rate:g}"]) for rate in RATES)


CLAIMS = [
    Claim(
        name="fp4-outliers",
        says="W4A4 from scratch: clamped inputs need their residual, and with it beat unclamped ones (section 4.3).",
        base="llama-scratch",
        arms={
            "float": Arm(),
            "neither": Arm(FP4Training(alpha=1).callbacks),
            "clamped": Arm(FP4Training(residual="none").callbacks),
            "clamped and compensated": Arm(FP4Training().callbacks),
            "compensated per token": Arm(FP4Training(over="token").callbacks),
            "tensor-wise scales": Arm(FP4Training(alpha=1, granularity="tensor").callbacks),
        },
        holds=ascending("clamped and compensated", "clamped", "neither", "tensor-wise scales"),
        expected="clamped and compensated < clamped < neither < tensor-wise scales",
        steps=200,
        lr=2e-3,
    ),
    Claim(
        name="fp4-gradient",
        says="W4 from scratch: the estimator is no worse than straight-through, each at its best rate (section 4.3).",
        base="llama-scratch",
        arms={
            f"{gradient} at {rate:g}": Arm(FP4Training(gradient=gradient).callbacks, lr=rate)
            for gradient in ("ste", "dge")
            for rate in RATES
        },
        holds=lambda numbers: best(numbers, "dge") <= best(numbers, "ste"),
        expected="the best dge <= the best ste",
        steps=200,
    ),
]
