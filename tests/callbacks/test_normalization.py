"""Normalization: batch norms measured once, on quantized weights; a resumed run does not measure again."""

import copy

import pytest
import torch
from torch import nn

from qlightning import QATCallback
from qlightning.callbacks.normalization import Normalization
from qlightning.methods import IntegerAllocation
from qlightning.solvers.batch_norm import reestimate


def with_norms(kit):
    module = kit.Net()
    module.net.insert(1, nn.BatchNorm1d(16))
    return module


def look(trainer, module):
    return copy.deepcopy(module)


def test_once_when_weights_begin_to_be_quantized(kit) -> None:
    steps, module, normalization = kit.Record(look=look), with_norms(kit), Normalization(3)
    before = kit.Record(look=look)
    kit.fit(module, QATCallback("int2-channel", start=2), before, normalization, steps, max_steps=4)
    same = [
        torch.equal(one.net[1].running_var, other.net[1].running_var)
        for one, other in zip(before.seen, steps.seen, strict=True)
    ]
    assert same == [True, True, False, True]
    by_hand = before.seen[2]
    reestimate(by_hand, list(kit.loader())[:3], forward=lambda m, batch: m.training_step(batch, 0))
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(by_hand.net[1], name), getattr(steps.seen[2].net[1], name))
    assert normalization.state_dict() == {"done": True}


def test_training_never_notices_that_data_were_read(kit) -> None:
    """Batch norms train on the statistics of their batch: losses are those of a run without it."""
    losses = []
    for extra in ([], [Normalization(2)]):
        seen = kit.Record()
        kit.fit(with_norms(kit), QATCallback("int4-channel"), *extra, seen, max_steps=3)
        losses.append(seen.losses)
    assert losses[0] == losses[1]


def test_a_resumed_run_does_not_measure_again(kit, tmp_path) -> None:
    """Its norms go on with what they have followed since."""
    runs = []
    for resume in (None, tmp_path / "step=2.ckpt"):
        module = with_norms(kit)
        callbacks = [QATCallback("int4-channel"), Normalization(2), kit.every_step(tmp_path)]
        kit.fit(module, *callbacks, max_steps=4, ckpt_path=resume)
        runs.append(module)
    for name, tensor in runs[0].state_dict().items():
        assert torch.equal(runs[1].state_dict()[name], tensor), name


def test_in_the_method(kit) -> None:
    method = IntegerAllocation(
        ["int2-channel-asym-learned", "int8-channel-asym-learned"],
        budget=12.0,
        layers="adaquant",
        steps=2,
        norms="measured",
        batches=2,
    )
    module = with_norms(kit)
    kit.fit(module, *method.callbacks(), max_steps=1)
    assert {m.weight_quantizer.format.bits for m in module.modules() if hasattr(m, "weight_quantizer")} == {2, 8}
    with pytest.raises(ValueError, match="has no batch norms"):
        kit.fit(kit.Net(), *method.callbacks(), max_steps=1)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="batches=16"):
        Normalization(0)
