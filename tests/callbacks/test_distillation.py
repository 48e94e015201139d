"""A student learns from the teacher that is named, the teacher stays what it is, and a resumed run has the same one."""

import copy
import os
import random
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Callback
from torch import nn

from qlightning import QATCallback
from qlightning.callbacks.distillation import DistillationCallback
from qlightning.callbacks.regularizer import RegularizerCallback
from qlightning.losses import KL, MSE, Cosine

KD = {"task_weight": 0.0}


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def sgd(kit, **more):
    """A module whose parameters stay where they are if their gradient is zero."""

    class Plain(kit.Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return type("Plain", (Plain,), more)()


@pytest.mark.parametrize("losses", [KL(temperature=2.0), {"net.2": MSE(), "forward": Cosine()}], ids=["logits", "both"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_student_like_its_teacher_has_nothing_to_learn(kit, losses, precision):
    module, record = sgd(kit), kit.Record()
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    kit.fit(module, DistillationCallback(losses=losses, **KD), record, max_steps=4, precision=precision)
    assert [loss for _, loss in record.losses] == [0.0] * 4
    expected = kit.Net().to(dtype)
    assert same(weights(module), weights(expected))


class Draws(Callback):
    """Numbers from every generator, at each step."""

    def __init__(self):
        self.drawn = []

    def on_train_batch_end(self, *args):
        self.drawn.append((random.random(), float(np.random.normal()), float(torch.rand(()))))


def test_the_teacher_sees_the_noise_of_the_student_and_costs_no_random_numbers(kit):
    """As in diffusion: what is compared depends on numbers that the step draws."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.log("noisy", x.sum())
        noise = torch.randn_like(x) + random.random() + np.random.normal()
        return (self(x + noise) - y).square().mean()

    runs = []
    for callbacks in ([DistillationCallback(**KD)], []):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        module, record, draws = sgd(kit, training_step=training_step), kit.Record(), Draws()
        kit.fit(module, *callbacks, record, draws, max_steps=3)
        runs.append((draws.drawn, [loss for _, loss in record.losses]))
    assert runs[0][0] == runs[1][0]
    assert runs[0][1] == [0.0] * 3 != runs[1][1]


@pytest.mark.parametrize("first", [True, False])
def test_quantized_from_the_first_step_on_by_its_float_self(kit, first):
    """The loss of each step is what a user's own step would have given, and the teacher is the float module."""
    float_ = kit.Net()

    class ByHand(kit.Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            with torch.no_grad():
                told = float_(x)
            said = self(x)
            kl = F.kl_div(said.log_softmax(-1), told.log_softmax(-1), log_target=True, reduction="batchmean")
            return 0.5 * (said - y).square().mean() + 0.2 * kl

    hand, one, two = ByHand(), kit.Record(), kit.Record()
    kit.fit(hand, QATCallback("int2"), one, max_steps=5)
    callbacks = QATCallback("int2"), DistillationCallback(task_weight=0.5, weight=0.2)
    module = kit.Net()
    trainer = kit.fit(module, *callbacks[:: 1 if first else -1], two, max_steps=5)
    assert [loss for _, loss in two.losses] == pytest.approx([loss for _, loss in one.losses], rel=1e-5)
    assert float(trainer.callback_metrics["distillation"]) > 0.01
    assert "training_step" not in vars(module)


def test_the_teacher_stays_as_it_is_and_out_of_everything(kit):
    found = {}

    class Looks(kit.Record):
        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            super().on_train_batch_end(trainer, pl_module, outputs, *args)
            teacher = found["teacher"] = distil._teacher.module
            kept = {id(p) for p in teacher.parameters()}
            assert not kept & {id(p) for p in pl_module.parameters()}
            assert not kept & {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
            assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
            assert set(pl_module.state_dict()) == names

    distil, module = DistillationCallback(task_weight=1.0), kit.Net()
    names = set(module.state_dict())
    kit.fit(module, distil, kit.every_step(kit.folder / "run"), Looks(), max_steps=4)
    assert same(weights(found["teacher"]), weights(kit.Net()))
    assert not same(weights(module), weights(kit.Net()))
    saved = torch.load(kit.folder / "run" / "step=4.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == names
    state = saved["callbacks"]["DistillationCallback[distillation]"]
    assert set(state) == {"digest", "file"}
    files = [p.name for p in (kit.folder / "run").glob("teacher-*")]
    assert files == [f"teacher-{state['digest'][:16]}.safetensors"]


QAT = {"weight": "int4-lsq", "input": "int8-tensor-lsq", "start": 2, "calibration": 2}


def distilled(kit, folder, resume=None, *, seed=1, options=KD, steps=6, module=None, **trainer_options):
    torch.manual_seed(seed)
    record, module = kit.Record(), module or kit.Net(dropout=0.3)
    callbacks = QATCallback(**QAT), DistillationCallback(**options), record, kit.every_step(folder)
    kit.fit(module, *callbacks, ckpt_path=resume, max_steps=steps, **trainer_options)
    return record.losses, module


def test_resumed_from_every_step(kit):
    folder = kit.folder / "run"
    losses, module = distilled(kit, folder)
    for step in range(1, 6):
        again, resumed = distilled(kit, folder, folder / f"step={step}.ckpt", seed=100 + step)
        assert again == losses[step:], step
        assert same(weights(resumed), weights(module)), step
    assert len(list(folder.glob("teacher-*"))) == 1


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_moved_run_finds_its_teacher_and_one_that_lost_it_says_so(kit):
    folder, moved = kit.folder / "run", kit.folder / "moved"
    losses, _ = distilled(kit, folder, steps=4)
    folder.rename(moved)
    assert distilled(kit, moved, moved / "step=2.ckpt", steps=4)[0] == losses[2:]
    (file,) = moved.glob("teacher-*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"teacher-\w+.safetensors is not what was written: the file is damaged"):
        distilled(kit, moved, moved / "step=2.ckpt", steps=4)
    file.unlink()
    with pytest.raises(ValueError, match=r"the teacher of this run is gone.*Put the file back"):
        distilled(kit, moved, moved / "step=2.ckpt", steps=4)


def test_the_folder_is_an_argument(kit):
    options = {**KD, "folder": str(kit.folder / "teachers")}
    distilled(kit, kit.folder / "run", options=options, steps=5)
    assert len(list((kit.folder / "teachers").iterdir())) == 1


def test_a_run_without_teacher_cannot_be_resumed_with_itself_as_one(kit):
    kit.fit(kit.Net(), kit.every_step(kit.folder / "run"), max_steps=2)
    path = kit.folder / "run" / "step=1.ckpt"
    with pytest.raises(ValueError, match=r"knows no teacher named 'distillation'.*without ckpt_path"):
        kit.fit(kit.Net(), DistillationCallback(**KD), kit.every_step(kit.folder / "run"), ckpt_path=path)
    record = kit.Record()
    callbacks = DistillationCallback(str(path), **KD), kit.every_step(kit.folder / "run"), record
    kit.fit(kit.Net(), *callbacks, ckpt_path=path, max_steps=2)
    assert record.losses[0][1] == 0  # taught by the very checkpoint it resumes from


def test_another_teacher_on_resume_is_refused(kit):
    folder, other = kit.folder / "run", kit.Net()
    with torch.no_grad():
        other.net[0].weight.mul_(1.5)
    losses, _ = distilled(kit, folder, options={"teacher": other, **KD}, steps=3)
    assert not list(folder.glob("teacher-*"))
    again = distilled(kit, folder, folder / "step=1.ckpt", options={"teacher": copy.deepcopy(other), **KD}, steps=3)
    assert again[0] == losses[1:]
    with pytest.raises(ValueError, match=r"not the one this run began with"):
        distilled(kit, folder, folder / "step=1.ckpt", options={"teacher": kit.Net(), **KD}, steps=3)


def test_the_same_trainer_fits_on_with_the_same_teacher(kit):
    distil, module = DistillationCallback(**KD), kit.Net()
    trainer = kit.fit(module, distil, QATCallback("int4-g8"), max_steps=2)
    first = distil._teacher
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, kit.loader(), kit.held_out())
    assert distil._teacher is first
    kit.fit(module, distil, max_steps=1)
    assert distil._teacher is not first


def test_tokens_that_do_not_count(kit):
    class Masked(kit.Loader):
        def __iter__(self):
            for x, y in super().__iter__():
                yield {"x": x, "y": y, "mask": torch.tensor([1, 1, 0, 0])}

    def training_step(self, batch, batch_idx):
        return (self(batch.pop("x")) - batch.pop("y")).square().mean()  # it takes its batch apart

    teacher = sgd(kit, training_step=training_step)
    with torch.no_grad():
        teacher.net[4].weight.mul_(2)
    record, module = kit.Record(), sgd(kit, training_step=training_step)
    trainer = kit.trainer(DistillationCallback(teacher, mask="mask", losses=MSE(), **KD), record, max_steps=1)
    trainer.fit(module, Masked(kit.rows(), batch_size=4), kit.held_out())
    x = kit.rows().tensors[0][:2]
    assert record.losses[0][1] == pytest.approx(kit.Net()(x).square().mean().item(), rel=1e-6)


def test_a_mask_that_is_not_there(kit):
    with pytest.raises(ValueError, match=r"mask='attention_mask' is no entry of the batch; it is a list"):
        kit.fit(kit.Net(), DistillationCallback(mask="attention_mask", **KD), max_steps=1)


def test_no_teacher_is_written_to_a_remote_folder(kit):
    distil = DistillationCallback(folder="s3://bucket/run", **KD)
    with pytest.raises(ValueError, match=r"cannot be written to s3://bucket/run.*folder='/local/folder'"):
        kit.fit(kit.Net(), distil, max_steps=1)


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # torch.compile does
def test_compiled(kit):
    def run(wrap):
        record = kit.Record()
        terms = DistillationCallback(losses={"forward": KL(), "net.2": MSE()}, task_weight=0.5)
        trainer = kit.trainer(terms, RegularizerCallback("net.0", weight=0.01), record, max_steps=2)
        trainer.fit(wrap(kit.Net()), kit.loader(), kit.held_out())
        return record.losses

    assert run(lambda module: torch.compile(module, backend="eager")) == run(lambda module: module)


def test_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "it")
    options = {
        "teacher": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}},
        "losses": {"forward": {"class_path": "qlightning.losses.KL", "init_args": {"temperature": 2.0}}},
        "weight": {"forward": 0.5},
        "task_weight": 0.0,
        "at": "model",
    }
    path = "qlightning.callbacks.distillation.DistillationCallback"
    it = parser.instantiate(parser.parse_object({"it": {"class_path": path, "init_args": options}})).it
    assert isinstance(it.teacher, nn.Linear)
    assert it.losses == {"forward": KL(temperature=2.0)}
    assert it.weights == {"forward": 0.5}
    options = {"task_weight": 1.0, "losses": {"class_path": "qlightning.losses.MSE"}}
    it = parser.instantiate(parser.parse_object({"it": {"class_path": path, "init_args": options}})).it
    assert (it.teacher, it.losses) == ("self", {"forward": MSE()})
    with pytest.raises(ArgumentError, match="task_weight"):
        parser.parse_object({"it": {"class_path": path}})


@pytest.mark.parametrize("order", [1, -1])
def test_beside_other_terms(kit, order):
    def run(order):
        record, module = kit.Record(), kit.Net()
        callbacks = [
            QATCallback("int4-g8"),
            DistillationCallback(**KD),
            DistillationCallback(losses={"net.2": MSE()}, name="hidden", **KD),
            RegularizerCallback("net.0", weight=0.01),
        ]
        trainer = kit.fit(module, *callbacks[::order], record, kit.every_step(kit.folder / str(order)), max_steps=4)
        assert {"distillation", "hidden", "kurtosis"} <= trainer.callback_metrics.keys()
        return record.losses

    assert [loss for _, loss in run(order)] == pytest.approx([loss for _, loss in run(1)], rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda kit: {"losses": {"net.9": MSE()}}, r"'net.9' names no submodule of Net; there are for example net"),
        (
            lambda kit: {"losses": {"net.0": MSE()}, "pairs": {"net.0": "nett.0"}},
            r"teacher of net.0: 'nett.0' names no",
        ),
        (
            lambda kit: {"losses": {"net.0": MSE()}, "pairs": {"net.0": "net.4"}},
            r"student net.0, teacher net.4: the student's is \(4, 16\) and the teacher's \(4, 4\)",
        ),
        (lambda kit: {"at": "nett"}, r"'nett' names no submodule of Net; there are for example net"),
        (lambda kit: {"losses": {}}, r"losses=\{'forward': KL\(\)\}"),
        (lambda kit: {"losses": {"a": MSE()}, "weight": {"b": 1.0}}, r"weight names 'b'.*there are 'a'"),
        (lambda kit: {"pairs": {"b": "c"}}, r"pairs names 'b'"),
        (lambda kit: {"weight": {"forward": 0.0}}, r"all above 0"),
        (lambda kit: {"losses": {"net": MSE()}, "at": "net.0"}, r"'net' names no submodule of Linear"),
    ],
)
def test_errors(kit, make, message):
    with pytest.raises(ValueError, match=message):
        kit.fit(kit.Net(), DistillationCallback(**{"task_weight": 1.0, **make(kit)}), max_steps=1)


def test_what_the_step_does_not_call(kit):
    class Direct(kit.Net):
        def training_step(self, batch, batch_idx):
            return (self.net(batch[0]) - batch[1]).square().mean()

    with pytest.raises(ValueError, match=r"student forward, teacher forward: forward was not called: name a submodule"):
        kit.fit(Direct(), DistillationCallback(**KD), max_steps=1)
    kit.fit(Direct(), DistillationCallback(losses={"net": KL()}, **KD), max_steps=1)

    class Twice(kit.Net):
        def training_step(self, batch, batch_idx):
            if self.training:
                self(batch[0])
            return self.loss(batch)

    with pytest.raises(ValueError, match=r"called 2 times in the student's step and 1 times in the teacher's"):
        kit.fit(Twice(), DistillationCallback(**KD), max_steps=1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its ranks by fork")
def test_two_processes(kit):
    folder = kit.folder / "run"

    class Write(kit.Record):
        def on_fit_end(self, trainer, pl_module):
            torch.save((self.losses, weights(pl_module)), kit.folder / f"rank{trainer.global_rank}.pt")

    callbacks = QATCallback("int4-g8"), DistillationCallback(**KD), Write(), kit.every_step(folder)
    kit.fit(kit.Net(), *callbacks, max_steps=3, strategy="ddp_fork", devices=2, check_val_every_n_epoch=9)
    (one, left), (two, right) = (torch.load(kit.folder / f"rank{rank}.pt") for rank in range(2))
    assert same(left, right)
    assert one != two  # each its own batches
    assert all(loss > 0 for _, loss in [*one, *two])
    assert len(list(folder.glob("teacher-*"))) == 1
    shutil.rmtree(folder)
