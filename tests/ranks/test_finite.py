"""NaN in one process of two: both do the same about it, each with what it holds."""

import math
import re
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from torch import distributed as dist

from qlightning import FiniteCallback, QATCallback, Raise, RestoreLastGood, SkipStep

BROKEN = 5


class Breaks(Callback):
    """In one batch of the second process: its inputs, or what it holds of one gradient."""

    def __init__(self, gradient=None):
        self.gradient, self.batch = gradient, -1

    def on_train_batch_start(self, trainer, module, batch, index):
        self.batch += 1
        if self._now() and self.gradient is None:
            batch[0].fill_(math.nan)

    def on_after_backward(self, trainer, module):
        if self._now() and self.gradient is not None:
            local(module.get_parameter(self.gradient).grad)[0] = math.nan

    def _now(self):
        return self.batch == BROKEN and dist.get_rank() == 1


class Held(Callback):
    """What a process holds of weights and moments at the end of each batch, by the step it is in then."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, *args):
        tensors = [*module.parameters(), *(s["exp_avg"] for s in trainer.optimizers[0].state.values())]
        self.seen.append((trainer.global_step, [local(tensor).detach().clone() for tensor in tensors]))


def local(tensor):
    return tensor._local_tensor if hasattr(tensor, "placements") else tensor


def fit(kit, strategy, policy, breaks, *callbacks):
    qat = QATCallback("int4-channel-lsq", "int8-tensor-lsq", start=2, calibration=1)
    return kit.fit(qat, breaks, FiniteCallback(policy), *callbacks, strategy=strategy, steps=8)


def said(run):
    try:
        run()
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.filterwarnings("ignore:FiniteCallback. back to step 4", "ignore:FiniteCallback. left out step 5")
@pytest.mark.parametrize("strategy", ["ddp", "quantized fsdp"])
def test_all_do_the_same(ranks, kit, strategy):
    gradient = "body.blocks.0.up.weight"

    def check():
        errors = [said(partial(fit, kit, strategy, Raise(), Breaks(g))) for g in (None, gradient)]
        skipping, back = Held(), Held()
        fit(kit, strategy, SkipStep(), Breaks(), skipping)
        fit(kit, strategy, RestoreLastGood(every=2), Breaks(gradient), back)
        return errors, skipping.seen, back.seen

    first, second = ranks(2, check)
    assert first[0] == second[0]
    (loss, one_gradient), *_ = first
    assert "step 5: not finite: the loss (in process 1); gradient of body.last." in loss
    assert loss.endswith("Run once more, it begins before body, whose input is not finite, in process 1")
    assert re.search(rf"step 5: not finite: gradient of .*{gradient} \(in process 1\); take", one_gradient)
    for _, skipped, back in (first, second):
        assert [step for step, _ in skipped] == [*range(1, 9)]
        held = dict(skipped)
        assert [equal(held[step], held[step + 1]) for step in (4, 5, 6)] == [False, True, False]
        assert [step for step, _ in back] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
        assert equal(back[5][1], back[3][1])
        assert not equal(back[6][1], back[4][1])
        assert all(bool(tensor.isfinite().all()) for tensor in back[-1][1])
    if strategy == "ddp":
        assert all(equal(one, other) for (_, one), (_, other) in zip(first[2], second[2], strict=True))


def equal(some, others):
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def test_a_scale_that_one_process_holds(ranks, kit):
    """What is reported of it is what all hold of it."""

    class Shrinks(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if index == 3:
                scale = local(module.body.blocks[0].up.weight_quantizer.scale.value.data)
                scale.mul_(1e-5 if dist.get_rank() == 1 else 1.0)

    def check():
        callback = FiniteCallback()
        with pytest.warns(UserWarning, match="has collapsed") if dist.get_rank() == 0 else torch.no_grad() as warned:
            qat = QATCallback("int4-channel-lsq")
            kit.fit(qat, Shrinks(), callback, strategy="quantized fsdp", steps=5)
        return callback._reported, callback._first, [str(w.message) for w in warned or ()]

    first, second = ranks(2, check)
    assert first[0] == second[0] == ["body.blocks.0.up.weight"]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    assert len([text for text in first[2] if "scale of body.blocks.0.up.weight has collapsed" in text]) == 1
