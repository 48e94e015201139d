"""What the three demonstrations give, over seeds: writes RESULTS.md beside this file and the table in the README.

    make results        (about half an hour on two cores; `rm -r runs/results` to measure again)

Every number is read from the `report.json` of a run of `qlightning fit --config ...`; nothing is typed by hand.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DEMOS = {
    "quickstart.yaml": ("Llama, 0.82 M parameters", "nats per byte", None),
    "vit/digits.yaml": ("ViT on digits", "cross-entropy", "val_accuracy"),
    "diffusion/digits.yaml": ("UNet on digits", "eps-MSE", None),
}


def run(config: str, seed: int, folder: Path) -> dict[str, Any]:
    """The report of one run in a folder of its own; a run whose report lies there is not repeated."""
    if not list(folder.rglob("report.json")):
        words = ["fit", "--config", str(ROOT / "configs" / config), "--seed_everything", str(seed)]
        words += ["--data.seed", str(seed), "--trainer.enable_progress_bar", "false"]
        folder.mkdir(parents=True, exist_ok=True)
        program = "from qlightning.cli import main; main()"
        with (folder / "log.txt").open("w") as log:
            subprocess.run([sys.executable, "-c", program, *words], cwd=folder, stdout=log, stderr=log, check=True)
    (report,) = folder.rglob("report.json")
    loaded: dict[str, Any] = json.loads(report.read_text())
    return loaded


def row(config: str, seed: int, report: dict[str, Any]) -> str:
    """A line of RESULTS.md."""
    label, unit, also = DEMOS[config]
    values = [f"{report[name]['loss']:.4f}" for name in ("float", "rtn", "qat")]
    if also:
        values = [f"{v} ({report[n][also]:.3f})" for v, n in zip(values, ("float", "rtn", "qat"), strict=True)]
    sizes = f"{report['float']['megabytes']:.2f} / {report['qat']['megabytes']:.2f}"
    share = "-" if report["recovered"] is None else f"{report['recovered']:.0%}"
    return f"| {label} | {seed} | {' | '.join(values)} | {unit} | {sizes} | {share} |"


def table(rows: list[str], reports: list[dict[str, Any]], seeds: list[int]) -> str:
    """All lines with their heading and what they were made with."""
    made = reports[0]["made"]
    circumstances = (
        f"Made by `make results` on {made['date']}, commit {made['commit']}, {made['machine']}, {os.cpu_count()} "
        f"cores, torch {made['torch']}, lightning {made['lightning']}, seeds {', '.join(map(str, seeds))}. Losses are "
        "held-out, in brackets accuracy. The float model is measured at the switch, after its own learning rate decay; "
        "QAT trains a quarter of its steps longer, and part of what it gives back is that."
    )
    head = "| model | seed | float | round-to-nearest | QAT | unit | MB float / quantized | gap recovered |"
    return "\n".join([circumstances, "", head, "|" + " --- |" * 8, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--demos", nargs="+", default=list(DEMOS), choices=list(DEMOS))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "results")
    options = parser.parse_args()
    rows: list[str] = []
    reports: list[dict[str, Any]] = []
    for config in options.demos:
        for seed in options.seeds:
            reports.append(run(config, seed, options.folder / config.replace("/", "-") / str(seed)))
            rows.append(row(config, seed, reports[-1]))
            print(rows[-1], flush=True)
            write(table(rows, reports, options.seeds))  # after every run, so that a stopped session keeps what it has


def write(text: str) -> None:
    """Into RESULTS.md, and into the README between its markers."""
    results = Path(__file__).parent / "RESULTS.md"
    _, mark, floors = results.read_text().partition("<!-- floors -->")  # that part is floors.py's
    results.write_text(f"# What the demonstrations give\n\n{text}\n\n{mark}{floors}".rstrip() + "\n")
    readme = ROOT / "README.md"
    block = f"<!-- results -->\n{text}\n<!-- end of results -->"
    marked = re.sub(r"<!-- results -->.*<!-- end of results -->", lambda _: block, readme.read_text(), flags=re.S)
    readme.write_text(marked)


if __name__ == "__main__":
    main()
