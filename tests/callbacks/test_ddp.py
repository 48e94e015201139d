"""Two processes: one calibration over the data of both, the same scales on both."""

import os

import pytest
import torch
from lightning.pytorch import Callback

from qlightning import QATCallback, Quantizer
from qlightning.evaluation.measure import measure
from qlightning.layers.convert import quantizers_of
from qlightning.numerics.formats import Int
from qlightning.numerics.granularity import PerTensor
from qlightning.numerics.learned import EMA

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its ranks by fork")


class Write(Callback):
    """What a rank saw and did, as files: the ranks are processes."""

    def __init__(self, kit):
        self.kit, self.batches, self.losses, self.states, self.measured = kit, [], [], [], ()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch[0])
        states = {name: q.scale.state_dict() for name, q in quantizers_of(pl_module)}
        flat = {f"{name}.{key}": value.clone() for name, state in states.items() for key, value in state.items()}
        self.states.append(flat | {"weight": pl_module.net[0].weight.detach().clone()})

        if trainer.global_step == 5:
            _, y = self.kit.rows(10, seed=8).tensors
            whole = (self.kit.outputs(pl_module) - y).square().mean()
            self.measured = measure(trainer, pl_module)["val_loss"], float(whole)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def on_fit_end(self, trainer, pl_module):
        found = {name: getattr(self, name) for name in ("batches", "losses", "states", "measured")}
        torch.save(found, self.kit.folder / f"rank{trainer.global_rank}.pt")


def run(kit, qat):
    options = {"strategy": "ddp_fork", "devices": 2, "check_val_every_n_epoch": 100}
    trainer = kit.trainer(qat, Write(kit), **options)
    trainer.fit(kit.Net(), kit.loader(), kit.held_out())
    return [torch.load(kit.folder / f"rank{rank}.pt") for rank in range(2)]


def test_learned_scales(kit):
    ranks = run(kit, QATCallback("int4-lsq", input="int8-tensor-lsq", start=4, calibration=3))
    assert not torch.equal(ranks[0]["batches"][0], ranks[1]["batches"][0])
    for step in range(4, 8):
        one, other = (rank["states"][step] for rank in ranks)
        values = [name for name in one if name.endswith("quantizer.value")]
        assert len(values) == 6
        assert all(torch.equal(one[name], other[name]) for name in [*values, "weight"])
    steps = [float(2 * x.abs().mean() / 127**0.5) for rank in ranks for x in rank["batches"][1:4]]
    assert float(ranks[0]["states"][4]["net.0.input_quantizer.value"]) == pytest.approx(sum(steps) / 6, rel=1e-6)
    assert all(torch.isfinite(torch.tensor(rank["losses"])).all() for rank in ranks)
    assert ranks[0]["measured"] == ranks[1]["measured"]
    assert ranks[0]["measured"][0] == pytest.approx(ranks[0]["measured"][1], rel=1e-6)  # 5 rows on each rank
    assert not torch.equal(
        *(ranks[0]["states"][step]["net.0.input_quantizer.value"] for step in (4, 7))  # they are learned
    )


def test_averages_that_go_on(kit):
    """As on one process that sees the mean of both: the average is linear."""
    ema = Quantizer(Int(8), PerTensor(), scale=EMA(decay=0.75))
    ranks = run(kit, QATCallback("int4-g8", input=ema, start=3, calibration=2, freeze_scales=6))
    largest = [[float(x.abs().max() / 127.5) for x in rank["batches"]] for rank in ranks]
    value = sum(0.75 * rank[1] + 0.25 * rank[2] for rank in largest) / 2
    for step in range(3, 8):
        for rank in ranks:
            assert float(rank["states"][step]["net.0.input_quantizer.value"]) == pytest.approx(value, rel=1e-3)
        if step < 6:
            value = 0.75 * value + 0.25 * (largest[0][step] + largest[1][step]) / 2
    assert torch.equal(ranks[0]["states"][7]["weight"], ranks[1]["states"][7]["weight"])
