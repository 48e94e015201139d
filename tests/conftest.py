"""What every test begins with, and `ranks`, which runs a function in several processes."""

import faulthandler
import multiprocessing
import os
import resource
import signal
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """The order in which workers take tests changes from run to run; what a test draws does not."""
    torch.manual_seed(0)


@contextmanager
def _files_end_after(size: int = 4096) -> Iterator[None]:
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="session")
def full_disk() -> Callable[..., Any]:
    """`with full_disk(4096):` no file of this process grows beyond so many bytes, as on a full disk."""
    return _files_end_after


class Ranks:
    """Runs a function in several processes of one group (gloo, on the CPU), as torchrun starts them.

    `ranks(2, check, *args)` is `[check(*args) on rank 0, check(*args) on rank 1]`. The processes are forks, so that
    nothing is imported again and `check` and its arguments may be anything, also a closure; what it returns must be
    picklable, tensors included. `torch.distributed` has its process group, and Lightning finds its processes started:
    any number of `Trainer(accelerator="cpu", strategy=..., devices=2)` may run in `check`, one after the other. With
    one rank there is no group and no environment: an ordinary process.

    An exception of any rank, or one that hangs, fails the test with the tracebacks of all. With `dies=1`, rank 1 has to
    be killed (SIGKILL), whatever then becomes of the others, and there are no results.

    Args:
        folder: For what the processes write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._calls = 0

    def __call__(
        self, count: int, check: Callable[..., Any], *args: Any, seconds: float = 120.0, dies: int | None = None
    ) -> list[Any]:
        self._calls += 1
        folder = self.folder / f"ranks-{self._calls}"
        folder.mkdir()
        port = _free_port()
        fork = multiprocessing.get_context("fork")
        processes: list[BaseProcess] = [
            fork.Process(target=_rank, args=(rank, count, port, folder, check, args)) for rank in range(count)
        ]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fork")
            for process in processes:
                process.start()
        hung = _wait(processes, seconds)
        if dies is not None and processes[dies].exitcode == -signal.SIGKILL and dies not in hung:
            return []
        if dies is not None or hung or any(process.exitcode for process in processes):
            pytest.fail(_story(processes, folder, hung, seconds), pytrace=False)
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _wait(processes: list[BaseProcess], seconds: float) -> list[int]:
    """Until all have ended; if one fails the others get a moment more. Returns the ranks that had to be killed."""
    deadline = time.monotonic() + seconds
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + 5)
        time.sleep(0.01)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hung:
        os.kill(processes[rank].pid or 0, signal.SIGUSR1)  # it writes where it hangs
    time.sleep(0.5 if hung else 0)
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    return hung


def _story(processes: list[BaseProcess], folder: Path, hung: list[int], seconds: float) -> str:
    lines = []
    for rank, process in enumerate(processes):
        fate = f"still running after {seconds:.0f} s, killed" if rank in hung else f"exit code {process.exitcode}"
        said = (folder / f"{rank}.txt").read_text() if (folder / f"{rank}.txt").exists() else ""
        said = said.split(" in _rank\n")[0] if rank in hung else said  # below it is pytest
        lines.append(f"--- rank {rank}: {fate}\n{said}")
    return "\n".join(lines)


def _rank(rank: int, count: int, port: int, folder: Path, check: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with open(folder / f"{rank}.txt", "w") as story:
        faulthandler.register(signal.SIGUSR1, file=story, all_threads=True)
        torch.set_num_threads(1)
        code = 1
        try:
            if count > 1:
                _join_group(rank, count, port, folder)
            torch.save(check(*args), folder / f"{rank}.pt")
            code = 0
        except BaseException:  # pytest's own outcomes too
            traceback.print_exc(file=story)
        story.flush()
        if code == 0 and torch.distributed.is_initialized():
            torch.distributed.barrier()  # nobody goes while others still talk to it
        os._exit(code)  # whatever pytest would do at exit is the parent's


def _join_group(rank: int, count: int, port: int, folder: Path) -> None:
    """As torchrun does on one machine."""
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "GLOO_SOCKET_IFNAME": "lo"},
        **{"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "test"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """See `Ranks`. Skipped where processes cannot be forked."""
    if not hasattr(os, "fork"):
        pytest.skip("starts its ranks by fork, which this system does not have")
    with tempfile.TemporaryDirectory() as folder:
        yield Ranks(Path(folder))
