"""Runs the claims and writes RESULTS.md beside this file.

    make claims                                             everything that has no result yet
    python tests/claims/run.py --only lsq cage --jobs 2     some claims

Workers share the arms of all claims and seeds; each leaves one JSON file in the folder of runs, and what lies there is
not run again. Nothing in RESULTS.md is typed by hand.
"""

import argparse
import fcntl
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))


def claims() -> dict[str, Any]:
    """Every claim by name, from the files."""
    found: dict[str, Any] = {}
    for path in sorted(HERE.glob("*_claim.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for claim in module.CLAIMS:
            assert claim.name not in found, f"{claim.name} stands in two files"
            found[claim.name] = claim
    return found


def measure(claim: Any, arm_name: str, seed: int, folder: Path, cifar: str) -> float:
    """Train one arm and return its number."""
    import torch
    from bases import data, task, task_class, train_float, trainer
    from lightning.pytorch import seed_everything

    from qlightning.schedules import Cosine

    torch.set_num_threads(1)
    arm = claim.arms[arm_name]
    steps, lr = what_is_trained(claim, arm_name)
    base, _, scratch = claim.base.partition("-")
    options: dict[str, Any] = {"lr": lr, "schedule": Cosine(warmup=0.05)}
    if scratch:
        seed_everything(seed, verbose=False)
        module = task(base, **options)
    else:
        checkpoint = train_float(base, seed, folder, cifar=cifar)
        module = task_class(base).load_from_checkpoint(checkpoint, map_location="cpu", **options)
        seed_everything(seed, verbose=False)
    source = data(base, seed, cifar=cifar)
    source = arm.data(source) if arm.data else source
    module = arm.module(module) if arm.module else module
    run = trainer(arm.callbacks(), max(1, steps))
    run.fit(module, source)
    if arm.metric is not None:
        return float(arm.metric(module, run, source))
    (metrics,) = run.validate(module, source, verbose=False)
    return float(metrics[claim.metric])


def what_is_trained(claim: Any, arm_name: str) -> tuple[int, float]:
    """Steps and peak learning rate of an arm. A number that was made with others is not this arm's."""
    arm = claim.arms[arm_name]
    steps = claim.steps if arm.steps is None else arm.steps
    return steps, (claim.lr if arm.lr is None else arm.lr) if steps else 0.0


def known_number(folder: Path, claim: Any, arm: str, seed: int) -> dict[str, Any] | None:
    """What an earlier run found for this arm as it stands now."""
    path = place(folder, claim.name, arm, seed)
    result: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return result if result and (result["steps"], result["lr"]) == what_is_trained(claim, arm) else None


def work(units: list[tuple[Any, str, int]], folder: Path, cifar: str) -> int:
    """What a worker process does: every unit (claim, arm, seed) that has no number and that no other worker holds.

    Returns:
        How many of them failed.
    """
    failed = 0
    for claim, arm, seed in units:
        path, began = place(folder, claim.name, arm, seed), time.monotonic()
        with path.with_suffix(".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when its process ends, however it ends
            except BlockingIOError:
                continue
            if known_number(folder, claim, arm, seed):
                continue
            steps, lr = what_is_trained(claim, arm)
            result: dict[str, Any] = {"claim": claim.name, "arm": arm, "seed": seed, "steps": steps, "lr": lr}
            result |= {"device": device(), "commit": commit()}
            try:
                result["value"] = measure(claim, arm, seed, folder, cifar)
            except Exception:  # the others are worth knowing; the log says what went wrong, the report what is missing
                traceback.print_exc()
                failed += 1
                continue
            result["seconds"] = round(time.monotonic() - began, 1)
            path.write_text(json.dumps(result))
            print(claim.name, arm, seed, result["value"], flush=True)
    return failed


def place(folder: Path, claim: str, arm: str, seed: int) -> Path:
    """Where a number lies."""
    return folder / f"{claim}--{arm}--{seed}.json".replace(" ", "_")


def device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


def commit() -> str:
    """The code that runs: of this checkout, or as whoever unpacked an archive of it says."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return head.stdout.strip() or os.environ.get("COMMIT", "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of claims, or beginnings of them")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "claims")
    parser.add_argument("--cifar", default=str(ROOT.parent / "shared" / "data" / "cifar10"))
    parser.add_argument("--report", action="store_true", help="only write RESULTS.md from the results there are")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    known = claims()
    if given.work:
        sys.exit(work(units(known, given.only), given.folder, given.cifar))
    if not given.report:
        run_all(given)
    (HERE / "RESULTS.md").write_text(report(known, given.folder))


def units(known: dict[str, Any], only: list[str] | None) -> list[tuple[Any, str, int]]:
    """All (claim, arm, seed), the first seed of every claim before the second of any."""
    chosen = [c for c in known.values() if not only or any(c.name.startswith(o) for o in only)]
    seeds = sorted({seed for claim in chosen for seed in claim.seeds})
    return [(claim, arm, seed) for seed in seeds for claim in chosen if seed in claim.seeds for arm in claim.arms]


def run_all(given: argparse.Namespace) -> None:
    """Every arm that has no number yet, by `--jobs` workers."""
    logs = given.folder / "logs"
    logs.mkdir(exist_ok=True, parents=True)
    words = ["--work", "--folder", str(given.folder), "--cifar", given.cifar]
    words += ["--only", *given.only] if given.only else []

    def worker(number: int) -> None:
        with (logs / f"{number}.txt").open("w") as log:
            failed = subprocess.run([sys.executable, __file__, *words], stdout=log, stderr=log, cwd=ROOT).returncode
        print(f"worker {number}: {failed} failed, see {logs}" if failed else f"worker {number}: done", flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(worker, range(given.jobs)))


def report(known: dict[str, Any], folder: Path) -> str:
    """RESULTS.md: one section per claim, whether it holds or not."""
    from claim import mean

    found = [(c.name, arm, seed, known_number(folder, c, arm, seed)) for c, arm, seed in units(known, None)]
    results = [result for *_, result in found if result]
    devices, commits = (sorted({r[name] for r in results}) for name in ("device", "commit"))
    lines = [
        "# Claims of the papers, on small models",
        "",
        f"Written by `make claims` on {date.today()}, at commit {', '.join(commits)}; run on {', '.join(devices)}. "
        "Each arm starts from the same float model of its seed (tests/claims/bases.py); numbers are held-out, mean and "
        "the single seeds. 'holds' is decided by a function in the claim's file, not by eye.",
        "",
        "| claim | holds | expected |",
        "| --- | --- | --- |",
    ]
    sections: list[str] = []
    for claim in known.values():
        mine: dict[str, dict[int, float]] = {arm: {} for arm in claim.arms}
        for name, arm, seed, result in found:
            if name == claim.name and result:
                mine[arm][seed] = result["value"]
        seeds = [seed for seed in claim.seeds if all(seed in by_seed for by_seed in mine.values())]
        numbers = {arm: [by_seed[seed] for seed in seeds] for arm, by_seed in mine.items()}
        verdict = ("yes" if claim.holds(numbers) else "**no**") if seeds else "not run"
        if seeds and len(seeds) < len(claim.seeds):
            verdict += f" (on {len(seeds)} of {len(claim.seeds)} seeds)"
        lines.append(f"| {claim.name} | {verdict} | {claim.expected} |")
        sections += ["", f"## {claim.name}: {verdict}", "", claim.says, ""]
        sections += [
            f"{claim.base}, {claim.steps} steps, lr {claim.lr:g}, {claim.metric}, seeds {list(claim.seeds)}.",
            "",
        ]
        sections += ["| arm | mean | seeds |", "| --- | --- | --- |"]
        for arm, by_seed in mine.items():
            values = [by_seed[s] for s in claim.seeds if s in by_seed]
            shown = f"{digits(mean(values))} | {', '.join(digits(v) for v in values)}" if values else "not run |"
            sections.append(f"| {arm} | {shown} |")
    return "\n".join([*lines, *sections]) + "\n"


def digits(value: float) -> str:
    return f"{value:.4f}" if abs(value) >= 0.001 or not value else f"{value:.2e}"


if __name__ == "__main__":
    main()
