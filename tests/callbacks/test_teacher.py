"""Teachers come from where they are said to come from, and nothing changes them."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn

from qlightning import QATCallback
from qlightning.callbacks.teacher import Teacher, build
from qlightning.layers.convert import quantizers_of


@pytest.fixture
def trainer(kit):
    return kit.trainer(max_steps=1)


def parameters(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Remembers(LightningModule):
    """Takes its size by argument and writes it down."""

    def __init__(self, size=4, *, step=False):
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Linear(8, size)
        self.head = nn.Linear(size, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        if self.hparams["step"]:
            self.calls += 1
        return (self(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch[0]).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_digest_tells_teachers_apart(kit, trainer):
    one, again = Teacher(kit.Net(), trainer), Teacher(kit.Net(), trainer)
    assert one.digest == again.digest
    for change in ("value", "dtype", "name"):
        net = kit.Net()
        if change == "value":
            net.net[0].bias.data[3] = torch.nextafter(net.net[0].bias.data[3], torch.tensor(9.0))
        elif change == "dtype":
            net.double()
        else:
            net.net[0].register_buffer("bias", net.net[0]._parameters.pop("bias").detach())
            net.net[0].register_buffer("other", net.net[0]._buffers.pop("bias"))
        assert Teacher(net, trainer).digest != one.digest, change


def test_saved_and_loaded(kit, trainer):
    net = kit.Net()
    net.tied = net.net[2]
    teacher = Teacher(net.bfloat16(), trainer)
    path = teacher.save(kit.folder / "new")
    written = path.stat().st_mtime_ns
    assert teacher.save(kit.folder / "new") == path
    assert path.stat().st_mtime_ns == written
    assert [p.name for p in path.parent.iterdir()] == [f"teacher-{teacher.digest[:16]}.safetensors"]
    other = Teacher(copy.deepcopy(net), trainer)
    with torch.no_grad():
        for p in other.module.parameters():
            p.zero_()
    other.load(path)
    assert other.digest == teacher.digest
    with other.running():
        pass
    assert other.module.tied is other.module.net[2]
    with pytest.raises(ValueError, match=r"is no teacher of this module: body.bias"):
        Teacher(Remembers(), trainer).load(path)


def test_it_is_frozen_and_leaves_the_random_numbers_alone(kit, trainer):
    teacher = Teacher(kit.Net(dropout=0.5), trainer)
    assert not any(p.requires_grad for p in teacher.module.parameters())
    assert not any(m.training for m in teacher.module.modules())
    before = torch.get_rng_state()
    with teacher.running():
        torch.randn(3)
        assert not teacher.module(torch.randn(2, 8)).requires_grad
    assert torch.equal(before, torch.get_rng_state())
    assert "log" not in vars(teacher.module)  # the user's module logs again, when it is used for something else


@pytest.mark.parametrize("how", ["in place", "anew"])
def test_one_that_changes_itself_is_refused(trainer, how):
    teacher = Teacher(Remembers(), trainer)

    def run():
        with teacher.running():
            if how == "anew":
                teacher.module.calls = torch.ones(1)
            else:
                teacher.module.calls.add_(1)

    with pytest.raises(ValueError, match=r"overwrites its calls.*at='model'"):
        run()


def test_self_is_a_float_copy(kit):
    """Also where QATCallback has converted the module, and hooks of the run stand on the instance."""
    found = {}

    class Copies(kit.Record):
        def on_train_start(self, trainer, pl_module):
            found["teacher"] = build("self", trainer, pl_module, None)
            found["part"] = build("self", trainer, pl_module, "net")

    module = kit.LazyNet()
    kit.fit(module, QATCallback("int4-lsq", input="int8-token"), Copies(), max_steps=1)
    teacher = found["teacher"]
    assert type(teacher) is kit.LazyNet
    assert not any(True for _ in quantizers_of(teacher))
    assert {"setup", "configure_model", "training_step"}.isdisjoint(vars(teacher))
    assert torch.equal(kit.outputs(teacher), kit.outputs(kit.Net()))
    assert isinstance(found["part"], nn.Sequential)
    assert not torch.equal(kit.outputs(module), kit.outputs(teacher))


def test_steps_that_stand_on_the_instance(kit, trainer):
    """A function cannot be copied: the teacher's would run the student. torch.compile's are left behind."""
    module = kit.Net()
    module.training_step = lambda batch, batch_idx: module.loss(batch)
    with pytest.raises(ValueError, match=r"training_step was replaced on this one Net.*write it into the class"):
        build("self", trainer, module, None)
    module = from_compiled(torch.compile(kit.Net(), backend="eager"))
    assert "training_step" in vars(module)
    copied = build("self", trainer, module, None)
    assert {"training_step", "forward"}.isdisjoint(vars(copied))
    assert torch.equal(kit.outputs(copied), kit.outputs(kit.Net()))


def test_from_a_checkpoint(kit, trainer):
    net, wide = kit.Net(), Remembers(size=16)
    kit.fit(net, kit.every_step(kit.folder / "plain"), max_steps=2)
    kit.fit(wide, kit.every_step(kit.folder / "wide"), max_steps=1)
    loaded = build(str(kit.folder / "plain" / "step=2.ckpt"), trainer, kit.Net(), None)
    assert same(parameters(loaded), parameters(net))
    path = str(kit.folder / "wide" / "step=1.ckpt")
    loaded = build(path, trainer, Remembers(size=4), None)
    assert same(parameters(loaded), parameters(wide))
    assert build(path, trainer, Remembers(size=4), "head").weight.shape == (4, 16)
    with pytest.raises(ValueError, match=r"(?s)no checkpoint of a Remembers like this.*Remembers.load_from_checkpoint"):
        build(path.replace("wide", "plain"), trainer, Remembers(), None)


def test_from_a_module(kit, trainer):
    student, teacher = kit.Net(), kit.LazyNet()
    assert build(teacher, trainer, student, None) is teacher
    assert teacher.net is not None  # it was built
    plain = nn.Linear(8, 16)
    assert build(plain, trainer, student, "net.0") is plain


def test_errors(kit, trainer):
    student = kit.Net()
    for source, at, message in [
        ("nowhere.ckpt", None, r"teacher='nowhere.ckpt' is no file: write the path of a checkpoint, 'self'"),
        (nn.Linear(8, 4), None, r"a Linear has no training_step.*DistillationCallback\(teacher, at='net'\)"),
        (student, None, r"net.0.weight is a parameter of the student.*copy.deepcopy"),
        (student.net, "net", r"teacher's 0.weight is a parameter of the student"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(source, trainer, student, at)
    assert all(p.requires_grad for p in student.parameters())
    shares = kit.Net()
    shares.net[0].weight = nn.Parameter(student.net[0].weight.data)  # another Parameter of the same memory
    with pytest.raises(ValueError, match=r"net.0.weight is a parameter of the student"):
        build(shares, trainer, student, None)
