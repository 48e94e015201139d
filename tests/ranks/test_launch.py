"""The command lines of the README that start several processes, with 2 on the CPU and a tiny model."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from qlightning.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SMALL = [
    *("--trainer.accelerator=cpu", "--trainer.max_steps=6", "--trainer.val_check_interval=3", "--trainer.precision=32"),
    *("--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
    *("--trainer.logger.save_dir=runs", "--data.max_bytes=20000", "--data.sequence_length=32", "--data.batch_size=4"),
    *("--model.model.hidden_size=16", "--model.model.intermediate_size=32", "--model.model.num_hidden_layers=2"),
    *("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"),
]
NO_PICTURES = ["--trainer.callbacks=qlightning.QATCallback", "--trainer.callbacks.weight=ternary"]

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:\s*.*was deprecated in v4:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:\s*By default only one Jsonargparse:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
]


def lines():
    section = README[README.index("### On several GPUs") : README.index("## What holds")]
    return [found.strip() for found in re.findall(r"```bash\n(.*?)```", section, re.S)]


def on_two(line: str, *, nodes: int = 1) -> list[str]:
    """The words of `qlightning` in a line, for 2 processes."""
    words = shlex.split(line)[shlex.split(line).index("qlightning") + 1 :]
    words[words.index("--config") + 1] = str(ROOT / words[words.index("--config") + 1])
    words[words.index("--trainer.devices") + 1] = str(2 // nodes)
    return [*words, *SMALL]


@pytest.mark.parametrize("number", [0, 1, 2], ids=["torchrun", "torchrun on two nodes", "slurm"])
def test_the_lines_fit(ranks, tmp_path, number):
    line = lines()[number]
    assert line.startswith(["torchrun --nproc-per-node 8 ", "torchrun --nnodes 2 ", "srun --nodes 2 "][number])
    assert f"{'ntasks' if number == 2 else 'nproc'}-per-node 8" in line

    def check():
        os.chdir(tmp_path)
        rank = dist.get_rank()
        if number:  # each process on a node of its own
            os.environ |= {"LOCAL_RANK": "0", "GROUP_RANK": str(rank), "LOCAL_WORLD_SIZE": "1"}
        if number == 2:
            del os.environ["TORCHELASTIC_RUN_ID"]
            os.environ |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NAME": "train"}
            os.environ |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_NODEID": str(rank)}
            os.environ |= {"SLURM_JOB_ID": "1", "SLURM_NODELIST": "node0,node1"}
        words = on_two(line, nodes=2 if number else 1)
        main([*words[: -len(SMALL)], *NO_PICTURES, *SMALL])

    ranks(2, check)
    assert list(tmp_path.rglob("last.ckpt"))


@pytest.mark.slow
def test_torchrun_itself(tmp_path):
    """As written, with 2 for 8; imports alone take both processes half a minute."""
    line = lines()[0].replace("--nproc-per-node 8", "--nproc-per-node 2")
    words = [sys.executable, "-m", "torch.distributed.run", *shlex.split(line)[1:]]
    first = words.index("qlightning")
    words[first:] = [str(Path(sys.executable).parent / "qlightning"), *on_two(line)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 6


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
def test_the_first_line_with_sharded_weights(ranks, tmp_path):
    """The whole of configs/quickstart.yaml: what is reported at its end is there, whoever held the weights."""
    line = lines()[0]

    def check():
        os.chdir(tmp_path)
        main([*on_two(line), "--trainer.strategy", "qlightning.QuantizedFSDP"])

    ranks(2, check)
    (report,) = tmp_path.rglob("report.json")
    measured = json.loads(report.read_text())
    assert {"float", "rtn", "qat"} <= measured.keys()
    (folder,) = tmp_path.rglob("last.ckpt")
    assert folder.is_dir()
