"""`qlightning bench` as a function."""

import copy
import gc
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
import torch._dynamo.utils
from torch import Tensor, nn

import qlightning
from qlightning.benchmark.clock import Clock, interleaved, peak, saved_for_backward
from qlightning.benchmark.contestant import Contestant, Ours, Plain
from qlightning.benchmark.peers import PEERS
from qlightning.benchmark.result import Result, Row
from qlightning.benchmark.workload import Size, Workload, fitting, workload

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def bench(
    size: Size | None = None,
    schemes: Sequence[str] = ("int4-g32", "int4-g32,int8-token"),
    *,
    peers: Sequence[str] = ("torchao", "brevitas", "modelopt"),
    tokens: int = 1024,
    length: int = 256,
    layers: int | None = None,
    device: str | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    compile: bool = False,
    rounds: int = 7,
    repeats: int = 2,
    clock: Clock = "wall",
    out: str | None = None,
) -> Result:
    """What quantization-aware training costs here: step time and memory beside plain training, in one process.

    All contestants train the same weights, one step after the other in turn, so that a machine that slows down slows
    all of them down. A step is forward, backward and one SGD update of every weight.

    Args:
        size: The model: llama-10m, llama-100m, llama-1b, llama-7b, llama-8b, vit-b or unet. Left out: what fits the
            device.
        schemes: Specs of weights, and of inputs behind a comma.
        peers: Other tools to measure with the same schemes, where they are installed.
        tokens: Of a step.
        length: Tokens of a sequence.
        layers: Fewer layers than the shape has.
        device: "cpu" or "cuda"; the GPU where there is one when left out.
        dtype: Of weights; bfloat16 on a GPU and float32 on a CPU when left out.
        compile: Under torch.compile, block by block.
        rounds: How often all take their turn.
        repeats: Steps of a turn.
        clock: On a CPU, "wall" time or "cpu" seconds of this process, which other programs do not lengthen.
        out: A JSON file for everything that was measured.

    Returns:
        Ratios to plain training.

    Raises:
        ValueError: A scheme, size or peer that there is not.
    """
    if unknown := set(peers) - set(PEERS):
        raise ValueError(f"peers: {min(unknown)!r} is none of {', '.join(PEERS)}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    size = size or fitting(place, tokens)
    kind = dtype or ("bfloat16" if place.type == "cuda" else "float32")
    work = workload(size, tokens=tokens, length=length, device=place, dtype=_DTYPES[kind], layers=layers)
    contestants: list[Contestant] = [Plain(), *(Ours(scheme) for scheme in schemes)]
    contestants += [PEERS[peer](scheme) for peer in peers for scheme in schemes]
    rows, steps = [], {}
    for contestant in contestants:
        row, step = _ready(contestant, work, place, compile)
        rows.append(row)
        if step is not None:
            steps[row.name] = step
    for name, seconds in interleaved(steps, rounds=rounds, repeats=repeats, device=place, clock=clock).items():
        next(row for row in rows if row.name == name).seconds = seconds
    timed = "GPU time" if place.type == "cuda" else f"{clock} time"
    settings = [f"sequences of {length}", kind, "compiled" if compile else "eager", timed, f"{rounds} rounds"]
    result = Result(work.name, settings, machine(place), rows)
    if out is not None:
        Path(out).write_text(json.dumps(result.json(), indent=1))
    return result


def _ready(
    contestant: Contestant, work: Workload, device: torch.device, compile: bool
) -> tuple[Row, Callable[[], None] | None]:
    """A contestant's row with what needs no clock, and its training step, warm; no step where it cannot be measured."""
    row = Row(contestant.name, why=contestant.absent() or "")
    if row.why:
        return row, None
    shared = {id(parameter): parameter for parameter in work.model.parameters()}
    try:
        model = contestant.prepare(copy.deepcopy(work.model, shared))  # a copy of the structure around the same weights
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not compile:  # compiled code keeps what its compiler chooses
            row.saved = saved_for_backward(lambda: work.loss(model(**work.inputs)), model)
        else:
            _compile(model)
            torch._dynamo.utils.counters.clear()
        step = _step(model, work, weights)
        for _ in range(3):
            step()
        if compile:
            row.graph_breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        row.peak = peak(step, device)
    except Exception as error:  # a tool that fails here is a row that says so, and no end of the others
        if isinstance(contestant, Plain | Ours):
            raise
        row.why = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]
        return row, None
    gc.collect()
    return row, step


def _step(model: Callable[..., Any], work: Workload, weights: Iterable[nn.Parameter]) -> Callable[[], None]:
    optimizer = torch.optim.SGD(weights, lr=0.0)  # every weight is read and written, and stays what all train

    def step() -> None:
        loss: Tensor = work.loss(model(**work.inputs))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _compile(model: nn.Module) -> None:
    """Repeated blocks one by one, which compiles in the time of one block; a model without them as a whole."""
    lists = [child for child in model.modules() if isinstance(child, nn.ModuleList) and len(child) > 1]
    torch._dynamo.config.cache_size_limit = 64  # all contestants' blocks are versions of one function
    alike = [child for child in lists if len({type(block) for block in child}) == 1]
    for block in max(alike, key=lambda child: sum(p.numel() for p in child.parameters())) if alike else [model]:
        block.compile()


def machine(device: torch.device) -> dict[str, str]:
    gpu = device.type == "cuda"
    folder = Path(qlightning.__file__).parent
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name(device) if gpu else f"{platform.machine()} CPU",
        "threads": f"{torch.get_num_threads()} threads",
        "torch": f"torch {torch.__version__}",
        "date": date.today().isoformat(),
        "commit": f"commit {found.stdout.strip()}" if found.returncode == 0 else f"qlightning {qlightning.__version__}",
    }
