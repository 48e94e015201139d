"""Cycles of fit, checkpoint, resume, prediction and export in one process, for long: memory stays what it was."""

import gc
import os
import shutil
import statistics
import time

import pytest
import torch

from qlightning.export.commands import export_checkpoint

MINUTES = float(os.environ.get("QLIGHTNING_SOAK_MINUTES", "30"))


def resident() -> float:
    """MB of this process in memory, after everything that is garbage has been let go."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def cycle(kit, folder) -> None:
    folder.mkdir()
    kit.train(folder, steps=9, width=256)
    module = kit.train(folder, steps=14, width=256)  # goes on from the checkpoint
    with torch.no_grad():
        trainer = kit.trainer(folder)
        assert len(trainer.predict(module, kit.rows())) == 5
    checkpoint = folder / "checkpoints" / "last.ckpt"
    for _ in range(2):  # the second takes the first one's place
        assert export_checkpoint(checkpoint, "plain", folder / "out", model=kit.Net, force=True, drop=["input"]).passed
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 600)
@pytest.mark.filterwarnings("ignore:.ModelCheckpoint|.*no last checkpoint|Checkpoint directory|.*ckpt_path=")
def test_memory_stays_flat(kit, tmp_path):
    seen, end = [], time.monotonic() + 60 * MINUTES
    while time.monotonic() < end or len(seen) < 8:
        cycle(kit, tmp_path / "run")
        seen.append(resident())
    quarters = [statistics.median(seen[i * len(seen) // 4 : (i + 1) * len(seen) // 4]) for i in range(4)]
    story = (
        f"{len(seen)} cycles: MB by quarter {[round(q, 1) for q in quarters]}, first {seen[0]:.1f}, last {seen[-1]:.1f}"
    )
    print(story)
    assert quarters[3] - quarters[1] < 0.01 * quarters[1], story
