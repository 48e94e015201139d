"""What is recorded of sharded weights is what is recorded of whole ones."""

import pytest

from qlightning import PageCallback, QATCallback, TrajectoryCallback

KINDS = {
    "ternary, from its step 2": lambda: QATCallback("ternary", start=2),
    "learned": lambda: QATCallback("int3-channel-lsq", "int8-tensor-lsq", calibration=2),
}


def run(kit, strategy):
    found = {}
    for name, make in KINDS.items():
        record = TrajectoryCallback(every=2)
        kit.fit(make(), record, module=kit.Net(lr=0.05), strategy=strategy, steps=6)
        found[name] = record.samples
    return found


@pytest.mark.parametrize(
    "strategy", ["quantized fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "fsdp1"))]
)
def test_the_same_samples(ranks, kit, strategy):
    alone = ranks(1, run, kit, "auto")[0]
    first, second = ranks(2, run, kit, strategy)
    for name, samples in alone.items():
        assert repr(first[name]) == repr(second[name])
        assert samples.keys() == first[name].keys()
        assert any(sample.flips > 0 for weight in samples.values() for sample in weight)
        for weight, wanted in samples.items():
            for sample, other in zip(wanted, first[name][weight], strict=True):
                assert tuple(other) == pytest.approx(tuple(sample), rel=1e-3, abs=0.01, nan_ok=True), (name, weight)


def test_a_page_needs_whole_weights(ranks, kit):
    def check():
        with pytest.raises(ValueError, match=r"strategy='ddp'.* `qlightning report` on a checkpoint"):
            kit.fit(QATCallback("int4-channel"), PageCallback(), strategy="quantized fsdp", steps=1)

    ranks(2, check)
