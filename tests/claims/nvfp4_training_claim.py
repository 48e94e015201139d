"""NVFP4 pre-training: what each part of the recipe is for (arXiv 2509.25149, section 4 and appendix E)."""

from typing import Any

from claim import Arm, Claim, Numbers, mean

from qlightning import QATCallback, Scheme
from qlightning.methods import NVFP4Training


def noisy_forward() -> list[Any]:
    """The recipe with stochastic rounding of weights and inputs too."""
    rules = NVFP4Training().quantization()["rules"]
    backward = rules["*"].backward
    return [QATCallback(rules={**rules, "*": Scheme("nvfp4-b16x16-sr", input="nvfp4-sr", backward=backward)})]


def lower(numbers: Numbers, *pairs: tuple[str, str]) -> bool:
    return all(mean(numbers[one]) < mean(numbers[other]) for one, other in pairs)


CLAIMS = [
    Claim(
        name="nvfp4-recipe",
        says="Stochastic rounding helps gradients and hurts the forward pass; float blocks help. The signs of tiles "
        "and rotation are not expected to show at this size (the paper sees none at 1.2 B).",
        base="llama-scratch",
        arms={
            "float": Arm(),
            "recipe": Arm(NVFP4Training().callbacks),
            "gradients to the nearest": Arm(NVFP4Training(gradients="nearest").callbacks),
            "noise in forward": Arm(noisy_forward),
            "no float blocks": Arm(NVFP4Training(0).callbacks),
            "no tiles": Arm(NVFP4Training(weights="1d").callbacks),
            "no rotation": Arm(NVFP4Training(rotation=None).callbacks),
            "scales rounded up": Arm(NVFP4Training(block_scale="up").callbacks),
        },
        holds=lambda numbers: lower(
            numbers,
            ("float", "recipe"),
            ("recipe", "gradients to the nearest"),
            ("recipe", "noise in forward"),
            ("recipe", "no float blocks"),
        ),
        expected="float < recipe < each of: gradients to the nearest, noise in forward, no float blocks",
        steps=200,
        lr=2e-3,
    ),
    Claim(
        name="nvfp4-late-switch",
        says="A forward pass that returns to float before the rate decays recovers the loss gap (section 5).",
        base="llama-scratch",
        arms={
            "float": Arm(),
            "recipe": Arm(NVFP4Training().callbacks),
            "forward released at 0.8": Arm(NVFP4Training(release_forward=0.8).callbacks),
        },
        holds=lambda numbers: lower(numbers, ("forward released at 0.8", "recipe")),
        expected="forward released < recipe",
        steps=200,
        lr=2e-3,
    ),
]
