"""One global batch, any number of processes, any way to share a model out: the same losses.

What is not the same is the order in which floats are added, of the loss and of gradients. It shows in the seventh
digit until a value that lies in the middle of two codes falls to the other side; from there on runs drift apart as any
two do that differ in one code: most stay within a thousandth in these 50 steps, distillation on 4 ranks within 2.7 %.
"""

import copy

import pytest
import torch

from qlightning import QATCallback
from qlightning.callbacks.distillation import DistillationCallback
from qlightning.losses.features import MSE
from qlightning.methods.bitnet_reloaded import BitNetReloaded
from qlightning.methods.cooldown_fusion import CooldownFusion
from qlightning.methods.l4q import L4Q
from qlightning.methods.lsq import LSQ

STEPS = 50


def distilled(kit):
    teacher = copy.deepcopy(kit.Body(seed=5))
    taught = DistillationCallback(teacher, at="body", task_weight=0.5, losses={"forward": MSE(), "blocks.*": MSE()})
    return [QATCallback("int4-channel-lsq", "int8-token"), taught]


KINDS = {
    # SGD sees the size of a step's gradient, which LSQ damps by the number of values; Adam would hide it
    "lsq w4a8": (lambda kit: LSQ(4, input_bits=8).callbacks(), {"optimizer": torch.optim.SGD, "lr": 0.02}),
    "l4q": (lambda kit: L4Q(4, group_size=8).callbacks(), {}),
    "ternary": (lambda kit: BitNetReloaded(measure="mean").callbacks(), {}),  # one mean over all of a weight
    "ternary from step 25": (lambda kit: [QATCallback("ternary-lsq", start=25)], {}),  # settled when it is sharded
    "distillation": (distilled, {"lr": 0.002}),
    "cooldown fusion": (lambda kit: CooldownFusion(start=0.5, weight="int4-channel-lsq").callbacks(), {}),
}


def run(kit, strategy, steps=STEPS):
    """The losses of every kind of run."""
    found = {}
    for name, (callbacks, options) in KINDS.items():
        torch.manual_seed(0)
        found[name], _ = kit.fit(*callbacks(kit), module=kit.Net(**options), strategy=strategy, steps=steps)
    return found


@pytest.fixture(scope="module")
def alone(ranks, kits):
    return ranks(1, run, kits(), "auto")[0]


@pytest.mark.parametrize(
    ("strategy", "count"),
    [
        ("ddp", 2),
        ("fsdp2", 2),
        pytest.param("fsdp1", 2, marks=pytest.mark.slow),
        pytest.param("ddp", 4, marks=pytest.mark.slow),
        pytest.param("fsdp2", 4, marks=pytest.mark.slow),
    ],
)
def test_losses(ranks, kit, alone, strategy, count):
    together = ranks(count, run, kit, strategy, seconds=300)
    for name, losses in alone.items():
        assert len(losses) == STEPS
        assert losses[-1] < 0.7 * losses[0]
        assert all(other[name] == together[0][name] for other in together)
        assert together[0][name] == pytest.approx(losses, rel=5e-2), name
        assert together[0][name][:10] == pytest.approx(losses[:10], rel=1e-5), name
