"""`qlightning report`, from the checkpoint of a run to the page."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from qlightning import QATCallback, TrajectoryCallback
from qlightning.cli import main
from qlightning.reporting.commands import report_checkpoint, report_command

NET = "tests.reporting.conftest.Net"


@pytest.fixture
def checkpoint(kit):
    """last.ckpt in `checkpoints`, metrics.csv one folder up, as Lightning lays them out."""
    logger = CSVLogger(kit.folder, name="run", version="")
    save = ModelCheckpoint(save_last=True, save_top_k=0, every_n_train_steps=8, save_on_train_epoch_end=False)
    callbacks = QATCallback("int4-g32", start=2, min_coverage=0.1), TrajectoryCallback(2), save
    kit.fit(kit.Net(), *callbacks, logger=logger, log_every_n_steps=1, enable_checkpointing=True)
    return kit.folder / "run" / "checkpoints" / "last.ckpt"


def test_from_a_run_to_its_page(kit, checkpoint, capsys):
    words = ["report", "--checkpoint", str(checkpoint), "--out", str(kit.out), "--model", NET]
    main(words)
    said = capsys.readouterr().out.strip()
    assert said.endswith("report.html, layers.png, weights.png, scales.png, trajectories.png, losses.png")
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 1
    assert "--force" in capsys.readouterr().err
    text = (kit.out / "report.html").read_text()
    assert "<h1>Net, run/last.ckpt</h1>" in text
    assert "step 8, epoch" in text
    assert "Logs read: metrics.csv." in text
    assert "quantized, step 2 to 8" in text
    assert "train_loss" in text
    assert "rule" in text
    assert "no trajectories recorded" not in text
    facts = json.loads((kit.out / "qlightning.json").read_text())
    saved = torch.load(checkpoint, weights_only=True)
    assert facts["step"] == saved["global_step"] == 8
    assert set(facts["weights"]) == {"net.0.weight", "net.2.weight", "head.weight"}


def test_the_facts_are_the_runs(kit, checkpoint):
    report = report_checkpoint(checkpoint, model=kit.Net)
    module = kit.Net.load_from_checkpoint(checkpoint)
    layer = module.net[0]
    w, q = layer.weight.detach(), layer.weight_quantizer(layer.weight).detach()
    assert report.weights[0].sqnr == pytest.approx(float(10 * torch.log10(w.square().sum() / (w - q).square().sum())))
    assert [sample.step for sample in report.run.samples["net.0.weight"]] == [2, 4, 6]
    assert [step for step, _ in report.run.logs.curves["train_loss"]] == list(range(8))
    assert report.run.reasons


def test_logs_may_lie_elsewhere(kit, checkpoint):
    other = kit.folder / "elsewhere"
    other.mkdir()
    (other / "metrics.csv").write_text("step,val_loss\n1,5.0\n")
    assert report_checkpoint(checkpoint, model=NET, logs=other).run.logs.curves == {"val_loss": [(1, 5.0)]}
    with pytest.raises(ValueError, match="is no folder"):
        report_checkpoint(checkpoint, model=NET, logs=kit.folder / "nowhere")


def test_what_is_wrong_is_said(kit, checkpoint):
    with pytest.raises(ValueError, match="is not there"):
        report_command(str(kit.folder / "no.ckpt"), str(kit.out))
    with pytest.raises(ValueError, match="none of qlightning's tasks"):
        report_command(str(checkpoint), str(kit.out))
    assert not kit.out.exists()
