"""The report's numbers, by hand and against the Trainer's own."""

import json

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from qlightning import QATCallback, ReportCallback, convert
from qlightning.layers.convert import restore

W3 = {"weight": "int3-g8", "start": 5}


def run(kit, *, report=None, qat=None, resume=None, module=None, folder="run", **options):
    report = report or ReportCallback(str(kit.folder / "report"))
    module = module or kit.Net()
    callbacks = QATCallback(**(qat or W3)), report, kit.every_step(kit.folder / folder)
    trainer = kit.fit(module, *callbacks, ckpt_path=resume, **{"max_steps": 14, **options})
    return report, module, trainer


def read(kit):
    return json.loads((kit.folder / "report" / "report.json").read_text())


def loss_of(kit, module):
    (values,) = kit.trainer().validate(module, kit.held_out(), verbose=False)
    return values["val_loss"]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.parametrize("qat", [W3, {"weight": "int3-lsq", "input": "int4-tensor-lsq", "start": 5, "calibration": 2}])
def test_the_three_losses_are_the_trainers(kit, qat):
    report, module, trainer = run(kit, qat=qat)
    written = read(kit)
    assert {name: written[name] for name in ("float", "rtn", "qat")} == report.measured
    assert written["qat"]["loss"] == pytest.approx(loss_of(kit, module), rel=1e-6)
    at_switch = kit.Net.load_from_checkpoint(kit.folder / "run" / "step=5.ckpt")
    assert written["float"]["loss"] == pytest.approx(loss_of(kit, restore(at_switch)), rel=1e-6)
    if "input" not in qat:
        convert(at_switch, qat["weight"])
        assert written["rtn"]["loss"] == pytest.approx(loss_of(kit, at_switch), rel=1e-6)
    assert written["switch"] == 5
    assert written["steps"] == trainer.global_step == 14
    assert written["rtn"]["loss"] > written["float"]["loss"]


def test_the_fields(kit):
    run(kit)
    written = read(kit)
    assert list(written) == ["float", "rtn", "qat", "recovered", "switch", "steps", "coverage", "made"]
    assert all(set(written[name]) == {"loss", "megabytes"} for name in ("float", "rtn", "qat"))
    weights = 8 * 16 + 16 * 16 + 16 * 4
    assert written["float"]["megabytes"] == 4 * (weights + 32) / 1e6
    assert written["rtn"]["megabytes"] == written["qat"]["megabytes"]
    assert written["qat"]["megabytes"] == (weights * 3 / 8 + weights / 8 * 4 + 4 * 32) / 1e6
    assert written["coverage"] == {
        **{"coverage/weight_share": 1.0, "coverage/layers": 3.0, "coverage/multiply_add_share": 1.0}
    }
    assert written["made"]["torch"] == torch.__version__
    assert {"date", "commit", "machine", "lightning"} < set(written["made"])


def test_the_recovered_share_by_hand(kit):
    report = ReportCallback()
    for losses, share in (((1.0, 2.0, 1.25), 0.75), ((1.0, 2.0, 2.5), -0.5), ((1.0, 2.0, 0.5), 1.5)):
        report.measured = {name: {"loss": loss} for name, loss in zip(("float", "rtn", "qat"), losses, strict=True)}
        assert report.recovered == pytest.approx(share)
    report.measured["rtn"] = {"loss": 1.0}
    assert report.recovered is None
    run(kit)
    written = read(kit)
    plain, rounded, trained = (written[name]["loss"] for name in ("float", "rtn", "qat"))
    assert written["recovered"] == (rounded - trained) / (rounded - plain)


def test_the_table_and_the_files(kit, caplog):
    caplog.set_level("INFO")
    report, _, _ = run(kit, report=ReportCallback(str(kit.folder / "report"), unit="nats"))
    shown = report.table().splitlines()
    assert shown[0].split() == ["float", "round-to-nearest", "QAT"]
    assert shown[1].startswith("held-out loss (nats)")
    assert shown[1].split()[-3:] == [f"{report.measured[name]['loss']:.4f}" for name in ("float", "rtn", "qat")]
    assert shown[-1].split()[-1] == f"{report.recovered:.0%}"
    assert report.table() in caplog.text
    folder = kit.folder / "report"
    assert {path.name for path in folder.iterdir()} == {"report.json", "losses.png", "coverage.txt"}
    assert "weight int3-g8" in (folder / "coverage.txt").read_text()
    picture = Image.open(folder / "losses.png")
    assert picture.size == (1040, 585)
    assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_further_metrics(kit):
    class Two(kit.Net):
        def validation_step(self, batch, batch_idx):
            self.log_dict({"val_loss": self.loss(batch), "val_bits": self.loss(batch) * 2})

    report, _, _ = run(kit, module=Two(), report=ReportCallback(str(kit.folder / "report"), also=["val_bits"]))
    assert all(values["val_bits"] == pytest.approx(2 * values["loss"]) for values in report.measured.values())
    assert report.table().splitlines()[2].startswith("bits")


def test_the_curves_are_the_runs(kit):
    losses = kit.Record()
    report = ReportCallback(str(kit.folder / "report"))
    kit.fit(kit.Net(), QATCallback(**W3), report, losses, max_steps=14, val_check_interval=3)
    assert report.train_losses == losses.losses
    assert [step for step, _ in report.held_out_losses] == [3, 6, 9, 12]


def test_it_changes_nothing_in_the_run(kit):
    """Neither its measuring nor its callbacks: the same losses, logs and checkpoints as without it."""

    def fit(*reports, name):
        torch.manual_seed(2)
        module, losses = kit.Net(dropout=0.4), kit.Record()
        stop = EarlyStopping("val_loss", patience=50)
        logger = CSVLogger(kit.folder, name=name)
        callbacks = QATCallback(**W3), *reports, losses, stop
        kit.fit(module, *callbacks, max_steps=14, logger=logger, log_every_n_steps=1, val_check_interval=3)
        logged = (kit.folder / name / "version_0/metrics.csv").read_text()
        return losses.losses, logged, stop.best_score, module.state_dict()

    with_report = fit(ReportCallback(str(kit.folder / "report")), name="with")
    without = fit(name="without")
    assert with_report[:3] == without[:3]
    assert all(torch.equal(value, with_report[3][name]) for name, value in without[3].items())


@pytest.mark.parametrize("step", [2, 5, 7, 13])
def test_resumed_runs_report_the_same(kit, step):
    """Not from an epoch's last step: Lightning does not make up for the validation that was to follow it."""
    report, _, _ = run(kit)
    whole = read(kit)
    resumed, _, _ = run(kit, resume=kit.folder / "run" / f"step={step}.ckpt")
    again = read(kit)
    assert {**again, "made": None} == {**whole, "made": None, "coverage": again["coverage"]}
    assert resumed.train_losses == report.train_losses
    assert resumed.held_out_losses == report.held_out_losses


def test_its_state_is_plain_data(kit):
    run(kit)
    state = torch.load(kit.folder / "run" / "step=9.ckpt", weights_only=True)["callbacks"]["ReportCallback"]
    assert set(state["measured"]) == {"float", "rtn"}
    assert state["switch"] == 5


def test_a_second_run_with_the_same_callback_reports_on_itself(kit):
    report, _, _ = run(kit)
    first = read(kit)
    other = kit.Net()
    torch.nn.init.normal_(other.net[4].weight)
    run(kit, report=report, module=other, qat={"weight": "int3-g8", "start": 3}, max_steps=8, folder="second")
    second = read(kit)
    assert (second["switch"], second["steps"], len(report.train_losses)) == (3, 8, 8)
    assert second["float"]["loss"] != first["float"]["loss"]


def test_quantized_from_the_first_step(kit):
    run(kit, qat={"weight": "int3-g8"}, max_steps=6)
    written = read(kit)
    assert written["switch"] == 0
    assert written["float"]["loss"] == pytest.approx(loss_of(kit, kit.Net()), rel=1e-6)


def test_manual_optimization_without_a_loss(kit):
    class Manual(kit.Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    report = ReportCallback(str(kit.folder / "report"))
    kit.fit(Manual(), QATCallback(**W3), report, max_steps=8)
    assert report.train_losses == []
    assert read(kit)["qat"]["loss"] < read(kit)["rtn"]["loss"]


def test_the_run_folder_when_none_is_named(kit):
    kit.fit(kit.Net(), QATCallback(**W3), ReportCallback(), logger=CSVLogger(kit.folder), log_every_n_steps=1)
    assert (kit.folder / "lightning_logs/version_0/report.json").exists()


# --- what cannot be reported ---


def test_a_metric_that_is_not_logged(kit):
    """Said before the first step, not hours later at the switch."""
    first = kit.Record()
    with pytest.raises(ValueError, match=r"does not log loss in validation, only val_loss; .*\(loss='val_loss'\)"):
        kit.fit(kit.Net(), QATCallback(**W3), ReportCallback(loss="loss"), first)
    assert first.losses == []


def test_no_validation_data(kit):
    class Trainable(kit.Net):
        validation_step = LightningModule.validation_step

    first = kit.Record()
    trainer = kit.trainer(QATCallback(**W3), ReportCallback(), first)
    with pytest.raises(ValueError, match=r"no validation data to measure on: .*val_dataloaders=..."):
        trainer.fit(Trainable(), kit.loader())
    assert first.losses == []


def test_a_run_that_ends_before_the_switch(kit):
    class Short(kit.Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.trainer.should_stop = True

    with pytest.raises(ValueError, match=r"ended at step 1 before all quantizers acted: .*QATCallback\(start=...\)"):
        run(kit, module=Short())


def test_a_rehearsal_need_not_reach_the_switch(kit):
    kit.fit(kit.Net(), QATCallback(**W3), ReportCallback(str(kit.folder / "report")), max_steps=-1, fast_dev_run=2)
    assert not (kit.folder / "report").exists()
