"""8-bit moments: the libraries' own optimizers in the place of torch's, for any module, and exact on resume."""

import subprocess
import sys

import bitsandbytes
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, SequentialLR
from torchao.optim import AdamW8bit

from qlightning import EightBitAdam, QATCallback
from qlightning.callbacks.eight_bit import in_eight_bits

KINDS = {"bitsandbytes": bitsandbytes.optim.AdamW8bit, "torchao": AdamW8bit}


@pytest.fixture(autouse=True)
def _eager():
    """torchao compiles its step, which takes a minute here and changes nothing that is tested."""
    with torch.compiler.set_stance("force_eager"):
        yield


def wide(kit, configure=None):
    """A module with a weight that is large enough to be kept in 8 bits."""

    class Wide(kit.Net):
        def __init__(self):
            super().__init__()
            generator = torch.Generator().manual_seed(4)
            self.net = nn.Sequential(nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 4))
            for parameter in self.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1

        def configure_optimizers(self):
            return configure(self) if configure else super().configure_optimizers()

    return Wide()


def scheduled(module):
    decayed, plain = [p for p in module.parameters() if p.ndim > 1], [p for p in module.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98))
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": LambdaLR(optimizer, lambda step: 0.9**step), "interval": "step"},
    }


@pytest.mark.parametrize("library", KINDS)
def test_the_libraries_own_step(library):
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    mine, theirs = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    given = torch.optim.AdamW([mine], lr=0.01, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.3)
    one = in_eight_bits(given, library)
    other = KINDS[library]([theirs], lr=0.01, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.3)
    assert type(one) is type(other)
    for _ in range(3):
        mine.grad = torch.randn(64, 128)
        theirs.grad = mine.grad.clone()
        one.step()
        other.step()
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("library", KINDS)
def test_in_a_run_with_learned_scales_and_a_schedule(kit, library):
    """Learned scales have their group; rates follow the schedule; the first step is that of 32 bits."""
    trainer = kit.fit(wide(kit, scheduled), QATCallback("int4-lsq", scale_lr=0.5), EightBitAdam(library), max_steps=3)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, KINDS[library])
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    assert rates == pytest.approx([0.01 * 0.9**3, 0.01 * 0.9**3, 0.005 * 0.9**3])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0]
    assert optimizer.param_groups[2]["learned_scales"]
    one, other = wide(kit, scheduled), wide(kit, scheduled)
    kit.fit(one, EightBitAdam(library), max_steps=1)
    kit.fit(other, max_steps=1)
    for (name, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6), name


@pytest.mark.parametrize("library", KINDS)
def test_two_bytes_instead_of_eight(kit, library):
    trainer = kit.fit(wide(kit), EightBitAdam(library), max_steps=1)
    memory = trainer.optimizers[0].state[trainer.lightning_module.net[0].weight]

    def size(value):
        inner = [getattr(value, name) for name in getattr(value, "tensor_attrs", [])] or [value]
        return sum(tensor.numel() * tensor.element_size() for tensor in inner if tensor.numel() >= 16)

    own = {name: value for name, value in memory.items() if isinstance(value, torch.Tensor) and "qmap" not in name}
    assert sum(size(value) for value in own.values()) < 2.6 * 4096 + (2048 if library == "torchao" else 0)


@pytest.mark.parametrize("library", KINDS)
def test_resume_is_exact(kit, library):
    def run(**options):
        record = kit.Record()
        module = wide(kit, scheduled)
        callbacks = QATCallback("int4-lsq", "int8-tensor-lsq", start=2, calibration=1), EightBitAdam(library), record
        kit.fit(module, *callbacks, kit.every_step(kit.folder), max_steps=7, **options)
        return record.losses, module.state_dict()

    losses, weights = run()
    again, ended = run(ckpt_path=kit.folder / "step=4.ckpt")
    assert again == losses[4:]
    assert all(torch.equal(ended[name], value) for name, value in weights.items())


def test_a_process_that_knows_nothing_of_it_reads_the_checkpoint(kit):
    """As export does. Nobody has imported the library there."""
    for library in KINDS:
        kit.fit(wide(kit), EightBitAdam(library), kit.every_step(kit.folder / library), max_steps=1)
    read = "import sys; from qlightning.checkpoints import *; steps = lambda path: read_checkpoint(path)['global_step']"
    read += "; print(*map(steps, sys.argv[1:]))"
    paths = [str(kit.folder / library / "step=1.ckpt") for library in KINDS]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", read, *paths], capture_output=True, text=True)
    assert done.stdout.split() == ["1"] * len(KINDS), done.stderr


def test_schedulers_in_schedulers(kit):
    def configure(module):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        parts = [ConstantLR(optimizer, 0.5, 2), ConstantLR(optimizer, 1.0, 1)]
        return [optimizer], [{"scheduler": SequentialLR(optimizer, parts, [2]), "interval": "step"}]

    module = wide(kit, configure)
    trainer = kit.fit(module, EightBitAdam(), max_steps=3)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, bitsandbytes.optim.Adam8bit)
    schedule = trainer.lr_scheduler_configs[0].scheduler
    assert all(part.optimizer is optimizer for part in (schedule, *schedule._schedulers))
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert "configure_optimizers" not in vars(module)


@pytest.mark.parametrize(
    ("configure", "message"),
    [
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), r"here is a SGD: return torch.optim.AdamW"),
        (lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True), r"has no amsgrad"),
    ],
    ids=["sgd", "amsgrad"],
)
def test_what_has_no_eight_bits(kit, configure, message):
    with pytest.raises(ValueError, match=message):
        kit.fit(wide(kit, configure), EightBitAdam(), max_steps=1)


def test_a_library_that_there_is_not():
    with pytest.raises(ValueError, match=r"EightBitAdam\('torchao'\)"):
        EightBitAdam("apex")
