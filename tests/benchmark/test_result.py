"""Ratios of rounds, in every form."""

import json

from qlightning.benchmark.result import Result, Row

RESULT = Result(
    "a model",
    ["float32"],
    {"device": "a machine"},
    [
        Row("plain", [1.0, 2.0, 4.0], saved=100),
        Row("ours", [1.1, 2.4, 4.0], saved=50, graph_breaks=0),
        Row("theirs", why="not installed"),
    ],
)


def test_ratios_are_within_a_round() -> None:
    plain, ours, _ = RESULT.rows
    assert RESULT.ratios(plain) == [1.0, 1.0, 1.0]
    assert RESULT.cells(ours) == ["ours", "1.100", "1.000 to 1.200", "0.500", "", "0", ""]


def test_who_could_not_be_measured_says_why_in_every_form() -> None:
    assert RESULT.cells(RESULT.rows[2]) == ["theirs", "", "", "", "", "", "not installed"]
    assert RESULT.text().splitlines()[-1].split() == ["theirs", "not", "installed"]
    assert "| theirs |  |  |  |  |  | not installed |" in RESULT.markdown()
    assert json.loads(json.dumps(RESULT.json()))["rows"][1]["seconds"] == [1.1, 2.4, 4.0]


def test_the_title_names_the_workload_the_settings_and_the_machine() -> None:
    assert RESULT.text().splitlines()[0].startswith("a model (float32) on a machine. Ratios")
