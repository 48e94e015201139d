"""Training, calibration and export are killed (SIGKILL) at random moments and begun again, until they are done.

Nothing that was left behind is ever taken for whole, no more is lost than the steps since the last checkpoint, and what
comes out is what an undisturbed run gives, bit for bit.
"""

import time
from itertools import pairwise

import pytest
import torch

from qlightning import QATCallback
from qlightning.callbacks.calibration import Calibration, calibrating
from qlightning.checkpoints import read_checkpoint
from qlightning.export.artifact import read_manifest, read_tensors
from qlightning.export.commands import export_checkpoint
from qlightning.solvers import GPTQ

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork"),
    pytest.mark.filterwarnings("ignore:.ModelCheckpoint|.*no last checkpoint|Checkpoint directory"),
]


def trials(few, many):
    """Some in every run of the tests, many where there is time."""
    return [*few, *(pytest.param(seed, marks=pytest.mark.slow) for seed in many)]


@pytest.fixture(scope="module")
def whole(kit, tmp_path_factory):
    """The undisturbed run: its losses by step, its last weights, and how long it takes."""
    folder = tmp_path_factory.mktemp("whole")
    begin = time.monotonic()
    kit.Victim(lambda: kit.train(folder), folder).finish()
    took = time.monotonic() - begin
    return {step: loss for _, step, loss in kit.losses(folder)}, torch.load(folder / "end.pt"), took


@pytest.mark.parametrize("seed", trials(range(4), range(100, 160)))
def test_training(kit, whole, tmp_path, seed):
    expected, end, took = whole
    moments = kit.Moments(seed, took, tmp_path / "checkpoints")
    for _ in kit.kills(lambda: kit.train(tmp_path), tmp_path, moments):
        last = tmp_path / "checkpoints" / "last.ckpt"
        saved = read_checkpoint(last)["global_step"] if last.exists() else 0  # whole, or this raises
        done = kit.losses(tmp_path)[-1][1] if kit.losses(tmp_path) else 0
        assert saved % kit.SAVED_EVERY == 0
        assert saved >= done - kit.SAVED_EVERY
    rows = kit.losses(tmp_path)
    assert max(step for _, step, _ in rows) == kit.STEPS
    assert all(expected[step] == loss for _, step, loss in rows)
    for (process, step, _), (later, begun, _) in pairwise(rows):
        assert begun == step + 1 if process == later else step - kit.SAVED_EVERY < begun <= step + 1
    ended = torch.load(tmp_path / "end.pt")
    assert ended.keys() == end.keys()
    assert all(torch.equal(value, end[name]) for name, value in ended.items())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]  # nothing lies about


@pytest.fixture(scope="module")
def calibrated(kit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated")
    begin = time.monotonic()
    kit.Victim(lambda: calibrate(kit, folder), folder).finish()
    return read_checkpoint(folder / "out.ckpt")["state_dict"], time.monotonic() - begin


def calibrate(kit, folder):
    """What `qlightning calibrate` does when it has read its options, which takes longer than all the rest."""
    callbacks = QATCallback("int4-g8"), Calibration(folder / "out.ckpt")
    trainer = kit.trainer(folder, *callbacks)
    calibrating(trainer, GPTQ(batches=2))
    torch.manual_seed(1)
    trainer.fit(kit.Net(), kit.rows())


@pytest.mark.parametrize("seed", trials(range(2), range(100, 120)))
def test_calibration(kit, calibrated, tmp_path, seed):
    expected, took = calibrated
    for _ in kit.kills(lambda: calibrate(kit, tmp_path), tmp_path, kit.Moments(seed, took, tmp_path)):
        assert not (tmp_path / "out.ckpt").exists() or equal(read_checkpoint(tmp_path / "out.ckpt"), expected)
    assert equal(read_checkpoint(tmp_path / "out.ckpt"), expected)


def equal(checkpoint, expected):
    found = checkpoint["state_dict"]
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def exported(kit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    kit.Victim(lambda: kit.train(folder, steps=kit.SAVED_EVERY * 3, width=512), folder).finish()
    begin = time.monotonic()
    kit.Victim(lambda: export(kit, folder, folder), folder).finish()
    return folder, dict(read_tensors(folder / "out")), time.monotonic() - begin


def export(kit, run, folder):
    checkpoint = run / "checkpoints" / "last.ckpt"
    export_checkpoint(checkpoint, "plain", folder / "out", model=kit.Net, force=True, drop=["input"])


@pytest.mark.parametrize("seed", trials(range(4), range(100, 140)))
def test_export(kit, exported, tmp_path, seed):
    run, expected, took = exported
    for _ in kit.kills(lambda: export(kit, run, tmp_path), tmp_path, kit.Moments(seed, took, tmp_path)):
        if (tmp_path / "out").exists():
            check(tmp_path / "out", expected)
    check(tmp_path / "out", expected)


def check(folder, expected):
    assert read_manifest(folder)["format"] == "plain"
    found = dict(read_tensors(folder))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_file_that_lightning_would_have_left_half_written_is_no_checkpoint(kit, tmp_path):
    """What a kill leaves when Lightning moves a file from another file system: the run says so and does not begin."""
    kit.Victim(lambda: kit.train(tmp_path, steps=2 * kit.SAVED_EVERY), tmp_path).finish()
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"last.ckpt is no whole checkpoint .* resume from another one"):
        kit.train(tmp_path)
