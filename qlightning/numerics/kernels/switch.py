"""When kernels act: by default wherever they are exact, on a GPU, outside torch.compile (which fuses by itself)."""

import functools
import importlib.util
import os

import torch
from torch import Tensor

_VARIABLE = "QLIGHTNING_KERNELS"
_chosen: list[bool] = []


def use_kernels(wanted: bool) -> None:
    """Turn Triton kernels on or off for the whole process; the environment's QLIGHTNING_KERNELS=0 does the same.

    Values do not depend on it, as every kernel equals its twin; sums (gradients of learned scales) are taken in
    another order.
    """
    _chosen[:] = [wanted]


def kernels_act(x: Tensor) -> bool:
    """Whether a kernel may take over for a tensor: it is on a GPU that Triton knows, and nobody turned kernels off."""
    if x.device.type != "cuda" or not _installed():
        return False
    return _chosen[0] if _chosen else os.environ.get(_VARIABLE, "1") != "0"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability() >= (8, 0)
