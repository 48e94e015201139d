"""CAGE against straight-through training of the same quantizers (arXiv 2510.18784)."""

from claim import Arm, Claim, ascending

from qlightning.methods import CAGE

CLAIMS = [
    Claim(
        name="cage",
        says="W3A3 from scratch: the pull toward the grid at the end of the run lowers the loss (card S94).",
        base="llama-scratch",
        arms={
            "straight-through": Arm(CAGE(3, input_bits=3, strength=0.0).callbacks),
            "cage": Arm(CAGE(3, input_bits=3).callbacks),
            "cage, coupled": Arm(CAGE(3, input_bits=3, mode="coupled").callbacks),
            "cage, early and weak": Arm(CAGE(3, input_bits=3, strength=2.5, silence=0.5).callbacks),
        },
        holds=ascending("cage", "straight-through"),
        expected="cage < straight-through",
        steps=600,
        seeds=(0, 1, 2),
        lr=2e-3,
    ),
]
