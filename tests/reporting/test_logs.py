"""Curves out of files that Lightning's own loggers wrote, and of broken ones."""

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from qlightning.reporting.logs import read_csv, read_events, read_logs

LOGGED = [(0, {"train_loss": 2.5}), (10, {"train_loss": 1.25, "val_loss": 3.0}), (20, {"val_loss": 0.1})]


def write(logger):
    for step, metrics in LOGGED:
        logger.log_metrics(metrics, step=step)
    logger.save()
    logger.finalize("success")


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_what_was_logged_is_read(tmp_path, kind):
    logger = kind(tmp_path, name="", version="")
    write(logger)
    logs = read_logs([tmp_path / "nothing", tmp_path])
    assert set(logs.curves) == {"train_loss", "val_loss"}
    assert [step for step, _ in logs.curves["train_loss"]] == [0, 10]
    assert [value for _, value in logs.curves["val_loss"]] == pytest.approx([3.0, 0.1])
    assert [path.parent for path in logs.files] == [tmp_path]
    assert logs.notes == []


def test_the_first_folder_with_curves_counts(tmp_path):
    for name, loss in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(f"step,loss\n3,{loss}\n")
    assert read_logs([tmp_path / "a", tmp_path / "b"]).curves == {"loss": [(3, 1.0)]}


def test_a_resumed_run_counts_once_and_in_order(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,loss,step\n0,1.0,5\n0,2.0,9\n0,3.0,5\n")
    assert read_logs([tmp_path]).curves == {"loss": [(5, 3.0), (9, 2.0)]}


def test_a_diverged_run_is_seen(tmp_path):
    (tmp_path / "metrics.csv").write_text("loss,step\nnan,1\ninf,2\nhello,3\n")
    values = [value for _, value in read_csv(tmp_path / "metrics.csv")["loss"]]
    assert values[0] != values[0]
    assert values[1:] == [float("inf")]


def test_what_cannot_be_read_is_said(tmp_path):
    (tmp_path / "metrics.csv").write_text("loss,time\n1.0,2\n")
    (tmp_path / "events.out.tfevents.1").write_bytes(b"\xff" * 40)
    logs = read_logs([tmp_path])
    assert logs.curves == {}
    assert any("no column 'step'" in note for note in logs.notes)
    assert any("events.out.tfevents.1 could not be read" in note for note in logs.notes)


@pytest.mark.parametrize("cut", [3, 20])
def test_a_killed_runs_last_record_is_left_out(tmp_path, cut):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    write(logger)
    (path,) = tmp_path.glob("events.*")
    whole = read_events(path)
    path.write_bytes(path.read_bytes()[:-cut])
    left = read_events(path)
    assert sum(map(len, left.values())) == sum(map(len, whole.values())) - 1
