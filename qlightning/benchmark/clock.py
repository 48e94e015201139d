"""Time and memory of several ways to train, side by side: drift of the machine hits all of them alike."""

import gc
import time
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

Clock = Literal["wall", "cpu"]


def interleaved(
    steps: Mapping[str, Callable[[], None]], *, rounds: int, repeats: int, device: torch.device, clock: Clock
) -> dict[str, list[float]]:
    """Seconds per step, one number per round and contestant.

    Args:
        steps: One training step of each, already warm.
        rounds: How often all of them take their turn; each begins one place later than in the round before.
        repeats: Steps of one turn.
        device: On a GPU, time is that between events on its stream.
        clock: "wall" time, or "cpu", the seconds that this process computes, which others on the machine do not
            lengthen.
    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(_turn(steps[name], repeats, device, clock) / repeats)
    return seconds


def _turn(step: Callable[[], None], repeats: int, device: torch.device, clock: Clock) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(repeats):
            step()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end)) / 1000
    now = time.perf_counter if clock == "wall" else time.process_time
    began = now()
    for _ in range(repeats):
        step()
    return now() - began


def saved_for_backward(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that a forward pass keeps for its backward, parameters and buffers of the model not counted.

    Args:
        forward: A forward pass, to the loss.
        model: Whose tensors lie there anyway.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()  # lives until the bytes are added up, so that no address is counted for two tensors
    total = sum(kept.values())
    del loss
    return total


def peak(step: Callable[[], None], device: torch.device) -> int | None:
    """Bytes of GPU memory at the highest moment of a step, above what lay there before; None on a CPU."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)
