"""The cost of QAT against its floors: runs `qlightning bench` and writes a section of RESULTS.md beside this file.

python tests/benchmarks/floors.py cpu        what a CPU can show; a few minutes per row
python tests/benchmarks/floors.py gpu        what a GPU can show
python tests/benchmarks/floors.py memory     peak of a 7B-shaped model under L4Q and LR-QAT, on a GPU
python tests/benchmarks/floors.py report     RESULTS.md from what the runs left in runs/benchmarks
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from qlightning.benchmark.command import bench, machine
from qlightning.benchmark.result import Result, Row
from qlightning.benchmark.workload import workload

HERE = Path(__file__).parent
BEGIN, END = "<!-- floors -->\n", "<!-- /floors -->\n"

CPU = {"size": "llama-10m", "tokens": 1024, "device": "cpu", "clock": "cpu", "rounds": 9, "repeats": 1}
GPU = {"size": "llama-1b", "tokens": 8192, "length": 2048, "device": "cuda", "compile": True, "rounds": 9, "peers": []}
WEIGHTS, INPUTS = "int4-g32", "int4-g32,int8-token"
W8A8, W4A8, W8A8_FP8 = (
    f"{weight},{input},fprop"
    for weight, input in [
        ("int8-channel", "int8-token"),
        ("int4-channel", "int8-token"),
        ("fp8e4m3-channel", "fp8e4m3-token"),
    ]
)
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "CPU, eager": {**CPU, "schemes": [WEIGHTS, INPUTS]},
        "CPU, compiled": {**CPU, "schemes": [WEIGHTS, INPUTS], "compile": True},
    },
    "gpu": {
        "GPU, forward": {**GPU, "schemes": ["int4-g128", W8A8, W8A8_FP8]},
        "GPU, all products": {**GPU, "schemes": [W4A8, f"{W8A8}+dgrad+wgrad", f"{W8A8_FP8}+dgrad+wgrad"]},
    },
}
FLOORS = {
    ("CPU, eager", WEIGHTS): 1.06,
    ("CPU, eager", INPUTS): 1.15,
    ("CPU, compiled", WEIGHTS): 1.05,
    ("CPU, compiled", INPUTS): 1.10,
    ("GPU, forward", "int4-g128"): 1.03,
    ("GPU, forward", W8A8): 0.95,
    ("GPU, forward", W8A8_FP8): 0.95,
    ("GPU, all products", W4A8): 0.95,
    ("GPU, all products", f"{W8A8}+dgrad+wgrad"): 0.75,
    ("GPU, all products", f"{W8A8_FP8}+dgrad+wgrad"): 0.75,
}
GPU_FLOORS = {  # by gpu.py's names
    "int4-g128": 1.03,
    "W8A8 int8 codes": 0.95,
    "W8A8 fp8 codes": 0.95,
    "W8A8 int8 codes in all three": 0.75,
}
PEAKS = {"L4Q": 20.0, "LRQAT": 12.0}


def peak_of(method: str, layers: int | None) -> dict[str, Any]:
    """Highest memory of two steps on a 7B-shaped model: 1,024 tokens, gradient checkpointing, AdamW on what trains."""
    import qlightning.methods as methods
    from qlightning.layers.convert import convert

    work = workload("llama-7b", tokens=1024, length=1024, device="cuda", dtype=torch.bfloat16, layers=layers)
    work.model.requires_grad_(False)
    scheme = getattr(methods, method)().quantization()["rules"]
    convert(work.model, scheme)
    work.model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    weights = [p for p in work.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    for _ in range(2):
        work.loss(work.model(**work.inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {"method": method, "peak": torch.cuda.max_memory_allocated() / 1e9, "floor": PEAKS[method]}
    return {**found, "trained": sum(p.numel() for p in weights), "machine": machine(torch.device("cuda"))}


def section(folder: Path) -> str:
    """What the runs found, as Markdown."""
    parts = ["# What QAT costs beside plain training", ""]
    parts += ["Made by `python tests/benchmarks/floors.py`. 'floor' is the ratio or size to stay below.", ""]
    for name in (name for runs in RUNS.values() for name in runs):
        path = folder / f"{name.replace(', ', '-')}.json"
        if not path.exists():
            parts += [f"## {name}: not run", ""]
            continue
        given = json.loads(path.read_text())
        result = Result(given["workload"], given["settings"], given["machine"], [Row(**row) for row in given["rows"]])
        parts += [f"## {name}", "", result.title(), "", "| " + " | ".join([*result.columns(), "floor"]) + " |"]
        parts += ["| --- " * 8 + "|"]
        for row in result.rows:
            floor = FLOORS.get((name, row.name.removeprefix("qlightning ")))
            cells = [*result.cells(row), "" if floor is None else f"{floor:.2f}"]
            parts += ["| " + " | ".join(cells) + " |"]
        parts += [""]
    for path in sorted(folder.glob("gpu*.json")):
        parts += _blocks_compiled(json.loads(path.read_text()))
    peaks = [json.loads(path.read_text()) for path in sorted(folder.glob("peak-*.json"))]
    if peaks:
        parts += ["## Peak memory of a 7B-shaped model", "", ", ".join(peaks[0]["machine"].values()), ""]
        parts += ["| method | GB | floor | parameters that train |", "| --- | --- | --- | --- |"]
        parts += [f"| {p['method']} | {p['peak']:.2f} | {p['floor']:.0f} | {p['trained']:,} |" for p in peaks]
        parts += [""]
    return "\n".join(parts)


def _blocks_compiled(given: dict[str, Any]) -> list[str]:
    """What a run of gpu.py found, as lines of Markdown."""
    on = f"{given['device']}, torch {given['torch']}, {given['date']}, commit {given['commit']}"
    lines = [f"## GPU, blocks compiled, commit {given['commit']}", ""]
    lines += [
        f"`gpu.py` with {given['options']}: a 1B-shaped Llama of 32,000 words, 8,192 tokens, bf16, AdamW, on {on}.",
        "",
    ]
    lines += ["| | milliseconds | time | rounds | floor |", "| --- | --- | --- | --- | --- |"]
    for scheme, row in given["steps"].items():
        spread = f"{row['ratios'][0]:.3f} to {row['ratios'][-1]:.3f}"
        lines += [f"| {scheme} | {row['ms']:.1f} | {row['ratio']:.3f} | {spread} | {GPU_FLOORS.get(scheme, '')} |"]
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*RUNS, "memory", "report"])
    parser.add_argument("--folder", type=Path, default=HERE.parents[1] / "runs" / "benchmarks")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than the shapes have")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, options in RUNS.get(given.what, {}).items():
        out = str(given.folder / f"{name.replace(', ', '-')}.json")
        print(bench(**options, layers=given.layers, out=out).text(), flush=True)
    for method in PEAKS if given.what == "memory" else ():
        found = peak_of(method, given.layers)
        print(found, flush=True)
        (given.folder / f"peak-{method}.json").write_text(json.dumps(found))
        torch.cuda.empty_cache()
    if given.what != "report":
        return
    path = HERE / "RESULTS.md"
    before = path.read_text().partition(BEGIN)[0].rstrip() + "\n\n" if path.exists() else ""
    path.write_text(f"{before}{BEGIN}{section(given.folder)}{END}")


if __name__ == "__main__":
    sys.exit(main())
