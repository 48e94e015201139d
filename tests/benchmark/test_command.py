"""The benchmark itself, on a model of one layer."""

import json

import pytest
import torch

from qlightning.benchmark.command import bench
from qlightning.cli import main

TINY = {"layers": 1, "tokens": 64, "length": 32, "rounds": 2, "repeats": 1, "device": "cpu"}


def test_everyone_trains_the_same_weights_and_leaves_them_as_they_were(tmp_path, monkeypatch) -> None:
    seen = []

    class Watched(torch.optim.SGD):
        def __init__(self, weights, **options) -> None:
            weights = list(weights)
            seen.append({weight.data_ptr() for weight in weights})
            super().__init__(weights, **options)

    monkeypatch.setattr(torch.optim, "SGD", Watched)
    result = bench("llama-10m", ["int4-g32", "int8-channel,int8-token"], peers=["torchao"], **TINY)
    assert [row.name for row in result.rows] == [
        "plain",
        "qlightning int4-g32",
        "qlightning int8-channel,int8-token",
        "torchao int4-g32",
        "torchao int8-channel,int8-token",
    ]
    assert len(seen) == 5
    assert all(weights == seen[0] for weights in seen)
    assert all(len(row.seconds) == 2 for row in result.rows), result.text()
    plain, ours, w8a8, theirs, _ = (row.saved for row in result.rows)
    assert w8a8 < plain
    assert ours <= 1.02 * plain < theirs


def test_the_command_prints_the_table_and_writes_everything(tmp_path, capsys) -> None:
    out = tmp_path / "bench.json"
    words = ["bench", "--size=llama-10m", '--schemes=["int4-g32"]', "--peers=[]", f"--out={out}"]
    main(words + [f"--{name}={value}" for name, value in TINY.items()])
    said = capsys.readouterr().out
    assert "qlightning int4-g32" in said
    rows = json.loads(out.read_text())["rows"]
    assert [len(row["seconds"]) for row in rows] == [2, 2]


def test_an_unknown_peer_is_refused() -> None:
    with pytest.raises(ValueError, match="'nncf' is none of torchao, brevitas, modelopt"):
        bench("llama-10m", peers=["nncf"], **TINY)
