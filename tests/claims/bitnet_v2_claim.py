"""What the rotation does for four-bit inputs of ternary layers (arXiv 2504.18415)."""

from claim import Arm, Claim, Numbers, mean

from qlightning.methods import BitNetV2


def rotation_closes_the_gap(numbers: Numbers) -> bool:
    eight, rotated, plain = (mean(numbers[arm]) for arm in ("A8, rotated", "A4, rotated", "A4"))
    return rotated < plain and rotated - eight < 0.5 * (plain - eight)


CLAIMS = [
    Claim(
        name="bitnet_v2",
        says="With the rotation before o_proj and down_proj, native 4-bit inputs cost next to nothing over 8-bit ones. "
        "(An independent study, arXiv 2510.23766, reports that rotated variants diverge.)",
        base="llama-scratch",
        arms={
            "A8": Arm(BitNetV2(late_bits=None, rotated=()).callbacks),
            "A8, rotated": Arm(BitNetV2(late_bits=None).callbacks),
            "A4": Arm(BitNetV2(input_bits=4, late_bits=None, rotated=()).callbacks),
            "A4, rotated": Arm(BitNetV2(input_bits=4, late_bits=None).callbacks),
            "A8 -> A4": Arm(BitNetV2(rotated=()).callbacks),
            "A8 -> A4, rotated": Arm(BitNetV2().callbacks),
        },
        holds=rotation_closes_the_gap,
        expected="A4, rotated < A4, and less than half of its distance from A8, rotated",
        steps=600,
        lr=2e-3,
    ),
]
