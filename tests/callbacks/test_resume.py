"""A killed run and an uninterrupted one give the same losses, bit for bit.

Checkpoints are ModelCheckpoint's, one after each optimizer step, and hold weights, optimizer, phases, observed
statistics, the position in the data and the random numbers.
"""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from qlightning import QATCallback, Quantizer
from qlightning.callbacks.phase import Phase
from qlightning.evaluation.random_state import random_state
from qlightning.layers.convert import quantizers_of
from qlightning.numerics.formats import Int
from qlightning.numerics.granularity import PerTensor
from qlightning.numerics.learned import EMA
from qlightning.schedules import Cosine
from qlightning.solvers import GPTQ, RTN

W4A8 = {"weight": "int4-lsq", "input": "int8-tensor-lsq", "start": 4, "calibration": 2, "freeze_scales": 9}
MOVING = {
    "weight": "int4-g8-sr",
    "input": Quantizer(Int(8), PerTensor(), scale=EMA(decay=0.8)),
    **{"start": 3, "calibration": 2, "freeze_scales": 8},
}
AT_ONCE = {"weight": "int4-lsq", "input": "int8-tensor-lsq", "calibration": 3}
FIVE = {
    **{"weight": "int4-lsq", "input": "int8-tensor-lsq", "calibration": 2},
    "schedule": [
        Phase(0, observe="input", lr=0.5),
        Phase(2, quantize="weight", lr=Cosine(warmup=2)),
        Phase(4, quantize="input", ramp=2, optimizer="reset"),
        Phase(7, train="scales", scale_lr=0.3),
        Phase(9, train="weights", lr=1.0),
    ],
}
ANNEALED = {
    **{"weight": "int8-lsq", "input": "int8-tensor-lsq", "calibration": 2, "start": 1, "ramp": 2},
    "anneal": {5: {"weight": "int6-lsq", "input": "int6-tensor-lsq"}, 8: {"input": "int4-tensor-lsq"}},
}
AVERAGES_ANNEALED = {
    **{"weight": "int8-g8-sr", "input": Quantizer(Int(8), PerTensor(), scale=EMA(decay=0.8)), "calibration": 2},
    **{"anneal": {4: {"input": Quantizer(Int(4), PerTensor(), scale=EMA(decay=0.8))}}, "freeze_scales": 6},
}
SOLVED = {"weight": "int4-g8", "input": "int8-tensor-lsq", "calibration": 2, "start": 3, "anneal": {6: "int3-g8"}}


class Noise(Callback):
    """Draws from every generator at each step, as augmentation or a noise schedule does."""

    def __init__(self) -> None:
        self.drawn: list[tuple[float, float, float]] = []

    def on_train_batch_start(self, *args) -> None:
        self.drawn.append((random.random(), float(np.random.normal()), float(torch.rand(()))))


def run(kit, folder, scheme, *, resume=None, seed=1, **options):
    """One process's run, as far as the random state goes."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    record, noise, module = kit.Record(), Noise(), kit.Net(dropout=0.4)
    callbacks = QATCallback(**scheme), record, noise, kit.every_step(folder, keep=-1 if resume is None else 0)
    kit.fit(module, *callbacks, ckpt_path=resume, **{"max_steps": 11, **options})
    return record.losses, noise.drawn, module


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        (W4A8, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_steps": 10}),
        (W4A8, {"val_check_interval": 2}),
        (MOVING, {"max_steps": -1, "max_epochs": 2}),
        (AT_ONCE, {"max_steps": 5}),
        (FIVE, {"val_check_interval": 3}),
        (ANNEALED, {"max_steps": 10}),
        (AVERAGES_ANNEALED, {"max_steps": 8, "accumulate_grad_batches": 2}),
        ({**SOLVED, "init": GPTQ(batches=2)}, {"max_steps": 8}),
        ({**SOLVED, "init": RTN(batches=2), "start": 0}, {"max_steps": 8}),
    ],
    ids=[
        *("accumulated", "validated", "moving", "at-once"),
        *("five", "annealed", "averages-annealed", "solved", "solved-at-once"),
    ],
)
def test_from_every_step(kit, scheme, options):
    folder = kit.folder / "run"
    losses, drawn, module = run(kit, folder, scheme, **options)
    steps = losses[-1][0]
    for step in range(1, steps):
        again, drawn_again, resumed = run(
            kit, folder, scheme, resume=folder / f"step={step}.ckpt", seed=100 + step, **options
        )
        assert again == losses[1 + [done for done, _ in losses].index(step) :], step
        assert drawn_again == drawn[-len(again) :], step
        for name, value in module.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), (step, name)


@pytest.mark.parametrize(
    ("scheme", "end"),
    [(W4A8, {"max_steps": 14}), (MOVING, {"max_steps": -1, "max_epochs": 3})],
    ids=["steps", "epochs"],
)
def test_killed_again_and_again(kit, scheme, end):
    """Each run dies behind one or a few steps; epochs end at 6 and 12."""
    whole, _, _ = run(kit, kit.folder / "whole", scheme, **end)
    seen, folder, resume = [], kit.folder / "pieces", None
    for begin, stop in ((0, 3), (3, 4), (4, 5), (5, 6), (6, 8), (8, 10), (10, 12), (12, 13)):
        torch.manual_seed(50 + stop)
        record = kit.Record()
        callbacks = QATCallback(**scheme), record, Noise(), kit.every_step(folder), Stop(stop)
        if begin == 0:
            torch.manual_seed(1), np.random.seed(1), random.seed(1)
        with pytest.raises(Killed):
            kit.fit(kit.Net(dropout=0.4), *callbacks, ckpt_path=resume, **end)
        seen += record.losses
        assert seen == whole[:stop]
        resume = folder / f"step={stop}.ckpt"


class Killed(Exception):
    pass


class Stop(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            raise Killed


def test_a_share_of_the_run_stays_the_step_it_was(kit):
    """A resumed run that is to last longer switches where the first one would have."""
    scheme = {"weight": "int4-lsq", "start": 0.5}
    folder = kit.folder / "run"
    run(kit, folder, scheme, max_steps=8)
    acting = kit.Record(look=lambda trainer, module: module.net[0].weight_quantizer.enabled)
    callbacks = QATCallback(**scheme), acting, Noise(), kit.every_step(folder)
    kit.fit(kit.Net(dropout=0.4), *callbacks, ckpt_path=folder / "step=2.ckpt", max_steps=16)
    assert acting.seen == [step >= 4 for step in range(2, 16)]


def test_other_arguments_take_effect_on_resume(kit):
    folder = kit.folder / "run"
    run(kit, folder, {"weight": "int4-lsq", "start": 6}, max_steps=8)
    steps = kit.Record(look=lambda trainer, module: kit.scales(module)["net.0.weight_quantizer.scale.value"])
    qat = QATCallback("int4-lsq", start=3, freeze_scales=5)
    callbacks = qat, steps, Noise(), kit.every_step(folder)
    kit.fit(kit.Net(dropout=0.4), *callbacks, ckpt_path=folder / "step=2.ckpt", max_steps=8)
    moved = [not torch.equal(a, b) for a, b in zip(steps.seen, steps.seen[1:], strict=False)]
    assert moved == [True, True, True, False, False]  # from 2: set at 3, trained at 3 and 4


def test_the_state_is_plain_data(kit):
    folder = kit.folder / "run"
    run(kit, folder, W4A8, max_steps=10)
    checkpoint = torch.load(folder / "step=5.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["QATCallback"]
    assert (state["at"], state["step"]) == ([4, 9], 4)

    def kinds(value):
        if isinstance(value, dict):
            return {type(value)} | {kind for item in (*value, *value.values()) for kind in kinds(item)}
        if isinstance(value, tuple | list):
            return {type(value)} | {kind for item in value for kind in kinds(item)}
        return {type(value)}

    assert kinds(state) <= {dict, list, tuple, str, bool, int, float, type(None), torch.Tensor}
    assert kinds(checkpoint["state_dict"]) <= {dict, str, torch.Tensor, type(checkpoint["state_dict"])}


def test_a_float_run_goes_on_quantized(kit):
    """Without learned scales nothing in the optimizer changes, so a run's own checkpoint may be resumed with it."""
    folder = kit.folder / "run"
    losses = kit.Record()
    kit.fit(kit.Net(), losses, kit.every_step(folder), max_steps=8)
    module, record = kit.Net(), kit.Record()
    kit.fit(
        module,
        *(QATCallback("int4-g8", start=6), record, kit.every_step(folder)),
        ckpt_path=folder / "step=4.ckpt",
        max_steps=8,
    )
    assert record.losses[:2] == losses.losses[4:6]
    assert record.losses[2:] != losses.losses[6:]
    assert all(quantizer.enabled for _, quantizer in quantizers_of(module))


# --- a real kill ---

SCRIPT = """
import sys, time, random
from pathlib import Path
import numpy as np, torch
from lightning.pytorch import Callback
from qlightning import QATCallback
import importlib.util
spec = importlib.util.spec_from_file_location("kit", sys.argv[1])
conftest = importlib.util.module_from_spec(spec); spec.loader.exec_module(conftest)
folder, resume = Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None
kit = conftest.Kit(folder)

class Write(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        with open(folder / "losses.txt", "a") as file:
            file.write(f"{trainer.global_step} {float(outputs['loss']).hex()}\\n")
        time.sleep(0.01)

torch.manual_seed(1 if resume is None else 2)
qat = QATCallback("int4-lsq", input="int8-tensor-lsq", start=10, calibration=5, freeze_scales=30)
kit.fit(conftest.Net(dropout=0.4), qat, Write(), kit.every_step(folder), ckpt_path=resume, max_steps=40)
"""


def test_a_real_kill(kit, tmp_path):
    """SIGKILL at a random moment of a run in another process, in the middle of whatever it did; then resume."""
    conftest = Path(__file__).parent / "conftest.py"
    folder = tmp_path / "killed"
    folder.mkdir()
    losses = folder / "losses.txt"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(conftest), str(folder)], stderr=subprocess.DEVNULL)
    torch.manual_seed(1)
    whole = kit.Record()
    kit.fit(
        kit.Net(dropout=0.4),
        QATCallback("int4-lsq", input="int8-tensor-lsq", start=10, calibration=5, freeze_scales=30),
        *(whole, kit.every_step(tmp_path / "whole")),
        max_steps=40,
    )
    chance = random.Random(5)
    wanted, deadline = chance.randrange(5, 35), time.monotonic() + 120
    while not losses.exists() or len(losses.read_text().splitlines()) < wanted:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.03))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = [line.split() for line in losses.read_text().splitlines()]
    assert [(int(step), float.fromhex(loss)) for step, loss in before] == whole.losses[: len(before)]

    step = max(int(path.stem.partition("=")[2]) for path in folder.glob("step=*.ckpt"))
    assert len(before) - 1 <= step <= len(before) + 1
    torch.manual_seed(3)
    rest = kit.Record()
    kit.fit(
        kit.Net(dropout=0.4),
        QATCallback("int4-lsq", input="int8-tensor-lsq", start=10, calibration=5, freeze_scales=30),
        *(rest, kit.every_step(folder)),
        ckpt_path=folder / f"step={step}.ckpt",
        max_steps=40,
    )
    assert rest.losses == whole.losses[step:]


def test_random_state_is_part_of_the_checkpoint(kit):
    folder = kit.folder / "run"
    run(kit, folder, {"weight": "int4-g8"}, max_steps=2)
    saved = torch.load(folder / "step=2.ckpt")["callbacks"]["QATCallback"]["own"]["of"][0]["random"]
    now = random_state()
    assert torch.equal(saved["torch"], now["torch"])
    assert saved["python"] == now["python"]
