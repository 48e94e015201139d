"""What is written, and what is said to be missing."""

import json

import pytest
from PIL import Image

from qlightning.evaluation.size import deployed_bytes
from qlightning.export.commands import verify_module
from qlightning.methods.fairy2i import PhaseSum
from qlightning.reporting.drawing import draw, missing, numbers, write


def test_files(kit):
    module = kit.net({"net.0": "int4-g32"})
    report = kit.report(module, logs=kit.logs(val_loss=[(1, 1.0), (2, 0.5)]))
    drawn = draw(report)
    write(report, kit.out, drawn)
    assert [picture.name for picture in drawn] == ["layers", "weights", "scales", "losses"]
    names = {"report.html", "qlightning.json", "layers.png", "weights.png", "scales.png", "losses.png"}
    assert {path.name for path in kit.out.iterdir()} == names
    for picture in drawn:
        with Image.open(kit.out / f"{picture.name}.png") as image:
            assert image.width > 300
    facts = json.loads((kit.out / "qlightning.json").read_text())
    assert facts["served_bytes"] == deployed_bytes(module)
    assert facts["weights"]["net.0.weight"]["bits"] == 5.0
    assert set(facts["files"]) == names - {"qlightning.json"}


def test_a_folder_is_replaced_only_if_it_is_a_report_and_one_says_so(kit):
    report = kit.report()
    write(report, kit.out, [])
    with pytest.raises(ValueError, match="--force"):
        write(report, kit.out, [])
    write(report, kit.out, [], force=True)
    other = kit.folder / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("x")
    with pytest.raises(ValueError, match="it is not replaced"):
        write(report, other, [], force=True)
    with pytest.raises(ValueError, match="is no export of qlightning"):
        verify_module(kit.net(), kit.out)


def test_a_full_disk(kit, full_disk):
    report = kit.report()
    write(report, kit.out, [])
    with (
        pytest.raises(OSError, match=r"could not be written \(File too large\); what was there is unharmed"),
        full_disk(),
    ):
        write(report, kit.out, draw(report), force=True)
    assert (kit.out / "report.html").read_text().endswith("</html>\n")
    assert [path.name for path in kit.out.parent.iterdir() if path.name.startswith(".")] == []


def test_what_is_absent_is_said(kit):
    said = dict(missing(kit.report()))
    assert "no trajectories recorded: add TrajectoryCallback()" in said["Step sizes and flips over training"]
    assert set(said) == {"Why layers stay in float", "Step sizes and flips over training", "Losses", "Phases"}
    dynamic = kit.report({"net.*": {"weight": "int8", "input": "int8-token"}})
    assert "2 quantizers take theirs" in dict(missing(dynamic))["Step sizes of activations"]
    recorded = kit.report(samples={})
    assert "before the first step" in dict(missing(recorded))["Step sizes and flips over training"]
    logged = kit.report(logs=kit.logs(lr=[(0, 1.0)], train_loss=[(0, 1.0)]))
    assert dict(missing(logged))["Other logged metrics"] == "lr."
    assert "Losses" not in dict(missing(logged))


def test_nothing_is_missing_of_a_weight_that_does_not_flip(kit):
    from qlightning.callbacks.trajectory import NAN, Sample

    report = kit.report({"net.*": PhaseSum()}, samples={"net.0.weight": [Sample(0, 1, 1, 1, NAN)]})
    assert "no weight has a single code" in dict(missing(report))["Flip rates"]


def test_numbers_are_json_also_where_a_weight_is_exact(kit):
    module = kit.net("int4-g32-lsq")
    module.net[0].weight.data = module.net[0].weight_quantizer(module.net[0].weight).detach()
    found = json.loads(json.dumps(numbers(kit.report(module)), allow_nan=False))
    assert found["weights"]["net.0.weight"]["sqnr_db"] is None
    assert found["weights"]["net.2.weight"]["sqnr_db"] > 10


def test_a_model_that_does_not_act_yet_is_drawn(kit):
    module = kit.net("int8-lsq")
    for name in ("net.0", "net.2", "head"):
        quantizer = module.get_submodule(name).weight_quantizer
        quantizer.enabled = quantizer.scale.ready = False
    report = kit.report(module)
    assert [picture.name for picture in draw(report)] == ["layers"]
    assert "no quantizer of a weight has a grid yet" in dict(missing(report))["Histograms of weights"]
