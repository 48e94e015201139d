"""What the report says and keeps."""

import torch

from qlightning.solvers.report import BlockRow, CalibrationReport, SiteRow


def report():
    row = SiteRow("layers.0.q", (4, 8), 100, before=0.5, after=0.25, changed=0.125, damping=0.01, seconds=1.5)
    rows = [row, SiteRow("layers.0.moe", (2, 2), note="left")]
    return CalibrationReport("GPTQ()", 3, rows, [BlockRow("layers.0", 0.01)], {"a": {"codes": torch.ones(2)}})


def test_the_table_shows_every_weight_and_block():
    table = report().table().splitlines()
    assert table[0] == "GPTQ() on 3 batches"
    assert table[2].split() == ["layers.0.q", "4", "x", "8", "100", "0.5", "0.25", "12.5%", "0.01", "1.50"]
    assert table[3].endswith("left")
    assert table[-1].split() == ["layers.0", "0.01"]


def test_its_state_is_plain_and_loads():
    again = CalibrationReport("GPTQ()", 3)
    again.load_state(report().state())
    assert again.sites == report().sites
    assert again.blocks == report().blocks
    assert torch.equal(again.states["a"]["codes"], torch.ones(2))
