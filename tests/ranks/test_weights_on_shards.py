"""What works on weights around optimizer steps does on shards what it does on whole weights, in float64 to 1e-9."""

import pytest
import torch

from qlightning import QATCallback
from qlightning.callbacks.cage import CAGECallback
from qlightning.callbacks.oscillation import ConfidenceAnnealing, OscillationCallback
from qlightning.numerics import Int, PerGroup, Quantizer

STEPS = 12


def freezing():
    return OscillationCallback(threshold=0.02, momentum=0.1, dampening=0.05, freezing=0.05, freeze_from=4)


KINDS = {
    "scales that are state": lambda: [QATCallback("int3-channel-lsq"), freezing()],
    "scales of rows": lambda: [QATCallback(Quantizer(Int(3, range="narrow"), PerGroup(8))), freezing()],
    "a scale of all": lambda: [QATCallback("ternary"), freezing()],
    "annealing": lambda: [QATCallback("int3-tensor-lsq"), ConfidenceAnnealing(0.2, start=3)],
    "cage": lambda: [QATCallback("int3-channel-lsq-sr"), CAGECallback(2.0, silence=0.2)],
}


def run(kit, strategy):
    kit.in_float64()
    found = {}
    for name, make in KINDS.items():
        callbacks = make()
        options = {"log_every_n_steps": 3, "module": kit.Net(lr=0.05)}
        losses, _ = kit.fit(*callbacks, strategy=strategy, steps=STEPS, **options)
        found[name] = losses, getattr(callbacks[1], "history", {})
    return found


@pytest.mark.filterwarnings("ignore:.*matplotlib")
def test_the_same_losses_and_readings(ranks, kit):
    alone = ranks(1, run, kit, "auto")[0]
    first, second = ranks(2, run, kit, "quantized fsdp")
    assert repr(first) == repr(second)
    for name, (losses, history) in alone.items():
        assert first[name][0] == pytest.approx(losses, rel=1e-9), name
        assert first[name][1].keys() == history.keys()
        for weight, readings in history.items():
            for reading, other in zip(readings, first[name][1][weight], strict=True):
                assert other == pytest.approx(reading, rel=1e-9, abs=1e-12), (name, weight)
        if history:
            assert any(reading[4] > 0 for readings in history.values() for reading in readings), f"{name}: none frozen"


@pytest.mark.parametrize("name", ["a scale of all", pytest.param("scales that are state", marks=pytest.mark.slow)])
def test_resume_is_exact(ranks, kit, name):
    def check():
        options = {"strategy": "quantized fsdp", "log_every_n_steps": 3}
        losses, _ = kit.fit(*KINDS[name](), kit.every_step(kit.folder), module=kit.Net(lr=0.05), steps=STEPS, **options)
        path = kit.folder / "step=8.ckpt"
        rest, _ = kit.fit(*KINDS[name](), module=kit.Net(lr=0.05), steps=STEPS, ckpt_path=path, **options)
        return losses, rest

    for losses, rest in ranks(2, check):
        assert rest == losses[8:]


@pytest.mark.slow
def test_a_process_without_rows(ranks, kit):
    """Three rows on four processes."""

    class Small(kit.Net):
        def __init__(self):
            super().__init__(lr=0.05)
            self.body.last = torch.nn.Sequential(torch.nn.Linear(16, 3), torch.nn.Linear(3, 4))

    def check():
        return kit.fit(*KINDS["scales that are state"](), module=Small(), strategy="quantized fsdp", steps=6)[0]

    losses = ranks(4, check)
    assert all(other == losses[0] for other in losses)
