"""When kernels act: by default wherever they are exact, for tensors on a GPU that Triton compiles for."""

import importlib.util
import os

import torch
from torch import Tensor

_VARIABLE = "QLIGHTNING_KERNELS"
_INSTALLED = importlib.util.find_spec("triton") is not None
_chosen: list[bool] = []


def use_kernels(wanted: bool) -> None:
    """Turn Triton kernels on or off for the whole process; the environment's QLIGHTNING_KERNELS=0 does the same.

    Values do not depend on it, as every kernel equals its twin; sums (gradients of learned scales) are taken in
    another order. What torch.compile has compiled stays as it is.
    """
    _chosen[:] = [wanted]


def kernels_act(x: Tensor) -> bool:
    """Whether a kernel may take over for a tensor: it is on a GPU that Triton knows, and nobody turned kernels off."""
    return x.device.type == "cuda" and _wanted()


def casts_float8(x: Tensor) -> bool:
    """Whether a tensor is on a GPU that converts to 8-bit floats in hardware; Triton compiles no cast for others."""
    return x.device.type == "cuda" and _has_float8()


def copies_blocks(x: Tensor) -> bool:
    """Whether a tensor is on a GPU with an engine that copies blocks (Hopper's)."""
    return x.device.type == "cuda" and _has_engine()


def processors(x: Tensor) -> int:
    """How many multiprocessors a tensor's GPU has."""
    return _processors(x.device.index or 0)


def _wanted() -> bool:
    if not _INSTALLED or not _capable():
        return False
    return _chosen[0] if _chosen else os.environ.get(_VARIABLE, "1") != "0"


def _capable() -> bool:
    return torch.cuda.get_device_capability() >= (8, 0)


def _has_float8() -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 9)


def _has_engine() -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0)


def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


for _asked in (_wanted, _has_float8, _has_engine, _processors):
    # What torch.compiler.assume_constant_result does, which imports the whole compiler to do it.
    setattr(_asked, "_dynamo_marked_constant", True)  # noqa: B010
