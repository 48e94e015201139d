"""Bits by integer program against the same bits everywhere (arXiv 2006.10518)."""

from claim import Arm, Claim, ascending

from qlightning import QATCallback
from qlightning.methods import IntegerAllocation

# int4-channel costs 4.2174 bits per weight of the quickstart's Llama, scales included
BUDGET = 4.217

CLAIMS = [
    Claim(
        name=f"ilp-{name}",
        says="At equal bytes, bits chosen by measured loss increases beat the same bits everywhere (card S111).",
        base="llama",
        arms={
            "4 bits everywhere": Arm(lambda: [QATCallback(weight="int4-channel")], steps=steps),
            "2, 3, 4, 6 or 8 bits": Arm(
                IntegerAllocation([f"int{b}-channel" for b in (2, 3, 4, 6, 8)], budget=BUDGET, batches=2).callbacks,
                steps=steps,
            ),
        },
        holds=ascending("2, 3, 4, 6 or 8 bits", "4 bits everywhere"),
        expected="allocated < everywhere",
    )
    for name, steps in (("rounding", 0), ("trained", 200))
]
