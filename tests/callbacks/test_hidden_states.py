"""Distillation from another model: logits and hidden states of submodules, paired by name and by glob."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlightning.callbacks.distillation import DistillationCallback
from qlightning.losses import KL, MSE

KD = {"task_weight": 0.0}


class Deep(nn.Module):
    """Blocks of one width, (N, 8) -> (N, 4)."""

    def __init__(self, depth, *, tuples=False):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(depth)])
        self.out = nn.Linear(8, 4)
        self.again = False

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
            x = x.relu()
        return {"logits": self.out(x), "last": x}


def deep(kit, depth, seed=0):
    class Holds(kit.Net):
        def __init__(self):
            super(kit.Net, self).__init__()
            torch.manual_seed(seed)
            self.model = Deep(depth)

        def forward(self, x):
            return self.model(x)["logits"]

    return Holds()


def hand_made(kit, teacher, factor):
    class ByHand(kit.Net):
        def __init__(self):
            super(kit.Net, self).__init__()
            self.model = deep(kit, 2).model

        def forward(self, x):
            return self.model(x)["logits"]

        def training_step(self, batch, batch_idx):
            x = batch[0]
            with torch.no_grad():
                told = teacher(x)
                first = teacher.blocks[0](x)
                third = teacher.blocks[2](teacher.blocks[1](first.relu()).relu())
            hidden = self.model.blocks[0](x)
            second = self.model.blocks[1](hidden.relu())
            logits = self.model.out(second.relu())
            said, told = (y.float().log_softmax(-1) for y in (logits, told["logits"]))
            kl = F.kl_div(said, told, log_target=True, reduction="batchmean")
            return kl + factor * (F.mse_loss(hidden, first) + F.mse_loss(second, third)) / 2

    return ByHand()


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=["plain", "accumulated", "bf16"]
)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("at", [None, "model"])
def test_another_model_as_teacher(kit, options, checkpointed, at):
    """Logits and hidden states of a deeper one, found by glob; a module, or a LightningModule that repeats the step."""
    torch.manual_seed(5)
    teacher = Deep(4)
    hand, one, two = hand_made(kit, copy.deepcopy(teacher), 0.3), kit.Record(), kit.Record()
    kit.fit(hand, one, max_steps=3, **options)
    student, given = deep(kit, 2), teacher
    student.model.again = checkpointed
    if at is None:
        given = deep(kit, 4)
        given.model = teacher
    prefix = "" if at else "model."
    distil = DistillationCallback(
        given,
        losses={f"{prefix}blocks.0": MSE(), f"{prefix}blocks.1": MSE(), "forward": KL()},
        weight={f"{prefix}blocks.0": 0.15, f"{prefix}blocks.1": 0.15},
        pairs={f"{prefix}blocks.1": f"{prefix}blocks.2"},
        at=at,
        **KD,
    )
    kit.fit(student, distil, two, max_steps=3, **options)
    rel = 0.05 if "precision" in options else 1e-5  # bfloat16 gradients are added up in another order
    assert two.losses[0][1] == pytest.approx(one.losses[0][1], rel=1e-5)
    assert [loss for _, loss in two.losses] == pytest.approx([loss for _, loss in one.losses], rel=rel)
    if "precision" not in options:
        learned = dict(student.named_parameters())
        for name, value in hand.named_parameters():
            assert torch.allclose(learned[name], value, atol=1e-5), name


def test_globs_pair_by_name(kit):
    student = deep(kit, 3)
    distil = DistillationCallback(losses={"blocks.*": MSE()}, pairs={"blocks.*": "model.blocks.*"}, **KD)
    record = kit.Record()
    kit.fit(student, distil, record, max_steps=2)
    assert record.losses[0][1] == 0
    assert [(s.name, t.name) for s, t in distil._matched(student, "blocks.*")] == [
        (f"model.blocks.{i}", f"model.blocks.{i}") for i in range(3)
    ]


def test_the_submodules_of_one_pattern_are_averaged(kit):
    """And the calls of one submodule; weights are those of the whole pattern."""
    student, teacher, record = deep(kit, 3), deep(kit, 3, seed=1), kit.Record()
    x = next(iter(kit.loader()))[0]
    with torch.no_grad():
        apart, said, told = [], x, x
        for mine, theirs in zip(student.model.blocks, teacher.model.blocks, strict=True):
            said, told = mine(said), theirs(told)
            apart.append(F.mse_loss(said, told).item())
            said, told = said.relu(), told.relu()
    distil = DistillationCallback(teacher, losses={"blocks.*": MSE()}, weight={"blocks.*": 0.3}, **KD)
    kit.fit(student, distil, record, max_steps=1)
    assert record.losses[0][1] == pytest.approx(0.3 * sum(apart) / 3, rel=1e-5)
