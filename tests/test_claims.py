"""The claims' files are sound; what they say is measured by `make claims`, not here."""

import json
import random
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "claims"
sys.path.insert(0, str(HERE))

import run  # noqa: E402

CLAIMS = run.claims()


def test_there_are_claims() -> None:
    assert CLAIMS


@pytest.mark.parametrize("name", list(CLAIMS))
def test_a_claim_has_arms_that_can_be_made_and_a_verdict_that_can_fall_either_way(name: str) -> None:
    claim = CLAIMS[name]
    assert len(claim.arms) > 1
    assert all(isinstance(arm.callbacks(), list) for arm in claim.arms.values())
    draw = random.Random(0)
    numbers = [{arm: [draw.random() for _ in claim.seeds] for arm in claim.arms} for _ in range(2000)]
    assert {bool(claim.holds(each)) for each in numbers} == {True, False}


def test_a_report_says_what_was_not_run(tmp_path: Path) -> None:
    text = run.report(CLAIMS, tmp_path)
    assert text.count(": not run\n") == len(CLAIMS)


def test_a_number_made_with_other_steps_is_not_the_arms(tmp_path: Path) -> None:
    claim = CLAIMS["lsq"]
    for arm in claim.arms:
        steps, lr = run.what_is_trained(claim, arm)
        for seed in claim.seeds:
            made = {"claim": "lsq", "arm": arm, "seed": seed, "steps": steps + (arm == "lsq" and seed == 0), "lr": lr}
            result = {**made, "value": 1.0, "device": "a", "commit": "b"}
            run.place(tmp_path, "lsq", arm, seed).write_text(json.dumps(result))
    assert run.known_number(tmp_path, claim, "lsq", 0) is None
    assert run.known_number(tmp_path, claim, "lsq", 1)
    assert "lsq: **no** (on 2 of 3 seeds)" in run.report(CLAIMS, tmp_path)
