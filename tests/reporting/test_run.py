"""What is read of a run, from states as callbacks write them."""

import json

import pytest
import torch

from qlightning import OscillationCallback, QATCallback, ReportCallback, TrajectoryCallback, convert
from qlightning.layers.coverage import Coverage, coverage_in
from qlightning.reporting.run import run_of, seen_in


def test_a_checkpoint_says_it_all(kit):
    qat = QATCallback("int4-g32", start=2, rules={"head": None}, min_coverage=0.1)
    report, record, watch = ReportCallback(), TrajectoryCallback(1), OscillationCallback()
    module = kit.Net()
    trainer = kit.fit(module, qat, report, record, watch, log_every_n_steps=2)
    trainer.save_checkpoint(kit.folder / "last.ckpt")
    saved = torch.load(kit.folder / "last.ckpt", weights_only=True)
    run = run_of(saved, module, title="it", folders=[])
    assert (run.step, run.epoch, run.reasons) == (8, saved["epoch"], True)
    assert run.coverage == qat.coverage
    assert {row.name: row.reason for row in run.coverage.rows}["head"] == "rule 'head'"
    assert [(span.begin, span.end) for span in run.spans] == [(0, 2), (2, 8)]
    assert run.samples == record.samples
    assert run.flips == {name: [(row[0], row[1]) for row in rows] for name, rows in watch.history.items()}
    assert run.measured == report.measured
    assert [step for step, _ in run.logs.curves["training loss"]] == list(range(1, 9))
    assert "ReportCallback kept" in run.logs.notes[0]


def test_what_was_measured_after_the_checkpoint_is_in_the_file_beside_it(kit):
    module, state = kit.net(), {"measured": {"float": {"loss": 1.0}}, "train_losses": []}
    (kit.folder / "report.json").write_text(json.dumps({"float": {"loss": 1.0}, "qat": {"loss": 2.0}, "switch": 3}))
    run = run_of({"callbacks": {"ReportCallback": state}}, module, title="it", folders=[kit.folder])
    assert run.measured == {"float": {"loss": 1.0}, "qat": {"loss": 2.0}}


def test_a_bare_checkpoint(kit):
    run = run_of({"global_step": 3}, kit.net(), title="it", folders=[kit.folder])
    assert (run.samples, run.flips, run.measured, run.spans, run.reasons) == (None, {}, {}, [], False)


@pytest.mark.parametrize("rules", ["int4-g32", {"net.0": {"weight": "int8", "input": "int8-token"}}])
def test_coverage_shows_by_itself_but_for_reasons(kit, rules):
    module = kit.Net()
    known = convert(module, rules, min_coverage=0.0)
    seen = seen_in(module)
    assert [(r.name, r.kind, r.weights, r.quantizers, set(r.placements)) for r in seen.rows] == [
        (r.name, r.kind, r.weights, r.quantizers, set(r.placements)) for r in known.rows
    ]
    assert seen.weight_share == known.weight_share
    assert {row.reason for row in seen.rows} == {"the checkpoint does not say why"}


def test_coverage_as_plain_data(kit):
    known = convert(kit.Net(), {"*": {"weight": "int4-g32", "input": "int8-token"}}, min_coverage=0.0)
    again = coverage_in(json.loads(json.dumps(known.plain())))
    assert isinstance(again, Coverage)
    assert again.table() == known.table()
