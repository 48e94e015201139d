"""PageCallback in real fits, with the loggers it knows and one it does not."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboardX.proto.event_pb2 import Event

from qlightning import PageCallback, QATCallback, TrajectoryCallback
from qlightning.reporting.logs import _records as records


def callbacks(page):
    return QATCallback("int4-g32-sr", start=2, min_coverage=0.1), TrajectoryCallback(2), page


def entries(folder: Path):
    """(tag, step, value) of everything in TensorBoard's files."""
    found = []
    for path in sorted(folder.glob("events.*")):
        for record in records(path):
            event = Event()
            event.ParseFromString(record)
            found += [(value.tag, event.step, value) for value in event.summary.value]
    return found


def test_a_fit_ends_with_a_page_and_pictures_in_tensorboard(kit):
    logger, module, plain = TensorBoardLogger(kit.folder, name="run", version=""), kit.Net(), kit.Net()
    plain.load_state_dict(module.state_dict())
    kit.fit(module, *callbacks(PageCallback(every_n_epochs=1)), logger=logger, log_every_n_steps=1)
    kit.fit(plain, callbacks(None)[0])
    for name, value in plain.state_dict().items():  # a report changes nothing
        assert torch.equal(value, module.state_dict()[name]), name
    out = kit.folder / "run" / "report"
    facts = json.loads((out / "qlightning.json").read_text())
    text = (out / "report.html").read_text()
    assert "Net, step 8" in text
    assert "float, step 0 to 2" in text
    assert "no trajectories recorded" not in text
    assert "train_loss" in text  # from TensorBoard's file
    assert module.training
    logged = entries(kit.folder / "run")
    pictures = [(tag, step) for tag, step, value in logged if value.HasField("image")]
    assert {step for _, step in pictures} == {4, 8}  # two epochs; the second is the end
    assert {tag for tag, _ in pictures} == {
        f"report/{name}" for name in ("layers", "weights", "scales", "trajectories", "losses")
    }
    (last,) = [value for tag, step, value in logged if (tag, step) == ("sqnr/net.0.weight", 8)][-1:]
    assert last.simple_value == pytest.approx(facts["weights"]["net.0.weight"]["sqnr_db"], rel=1e-5)
    histogram = next(value.histo for tag, _, value in reversed(logged) if tag == "on_grid/net.0.weight")
    assert 0.99 < sum(histogram.bucket) <= 1.0001
    assert histogram.bucket_limit[0] < -7
    assert histogram.bucket_limit[-1] > 6


def test_pictures_in_weights_and_biases_and_numbers_elsewhere(kit, monkeypatch):
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(kit.folder))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=str(kit.folder), offline=True, project="p")
    other = CSVLogger(kit.folder, name="run", version="")
    kit.fit(kit.Net(), *callbacks(PageCallback(str(kit.out))), logger=[logger, other], log_every_n_steps=4)
    other.save()
    header = (kit.folder / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"sqnr/net.0.weight", "report/served_megabytes", "report/quantized_share"} <= set(header)
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    facts = json.loads((kit.out / "qlightning.json").read_text())
    assert summary["sqnr/head.weight"] == pytest.approx(facts["weights"]["head.weight"]["sqnr_db"])
    assert summary["report/layers"]["_type"] == "image-file"
    assert summary["on_grid/net.0.weight"]["_type"] == "histogram"
    assert len(list(kit.folder.rglob("media/images/report/layers*.png"))) == 1


def test_what_is_wrong_is_said_before_the_fit(kit):
    with pytest.raises(ValueError, match="every_n_epochs=0"):
        PageCallback(every_n_epochs=0)
    kit.out.mkdir()
    (kit.out / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="choose another folder"):
        kit.fit(kit.Net(), *callbacks(PageCallback(str(kit.out))))


def test_a_rehearsal_writes_nothing(kit):
    kit.fit(kit.Net(), *callbacks(PageCallback(str(kit.out))), fast_dev_run=2)
    assert not kit.out.exists()
