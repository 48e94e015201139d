"""AWQ against rounding to nearest, alone and as where training starts (arXiv 2306.00978)."""

from claim import Arm, Claim, ascending

from qlightning import QATCallback
from qlightning.methods import AWQ

CLAIMS = [
    Claim(
        name="awq",
        says="INT3 groups: scales from activations beat rounding to nearest, and clipping adds to it (card S93).",
        base="llama",
        arms={
            "rounding": Arm(lambda: [QATCallback("int3-g64-asym")], steps=0),
            "scales": Arm(AWQ(3, granularity=64, shrink=0.0, batches=8).callbacks, steps=0),
            "scales and clipping": Arm(AWQ(3, granularity=64, batches=8).callbacks, steps=0),
            "scales, clipping, gptq": Arm(AWQ(3, granularity=64, then="gptq", batches=8).callbacks, steps=0),
        },
        holds=ascending("scales and clipping", "scales", "rounding"),
        expected="scales and clipping < scales < rounding",
    ),
    Claim(
        name="awq-start",
        says="Two bits: training that starts from AWQ's weights ends lower than from rounding (ours, not the paper's).",
        base="llama",
        arms={
            "from rounding": Arm(lambda: [QATCallback("int2-g64-asym")]),
            "from awq": Arm(AWQ(2, granularity=64, batches=8).callbacks),
        },
        holds=ascending("from awq", "from rounding"),
        expected="from awq < from rounding",
    ),
]
