"""The state in which a model is calibrated, and everything as it was afterwards."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from qlightning.capture import device_of
from qlightning.evaluation.modes import eval_mode, quantizers_off, silent
from qlightning.evaluation.random_state import random_state, restore_random_state


@contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Eval mode, no quantizer acts or observes, no cache, logging, autocast or compiled code, exact float32 products.

    Training flags, switches of quantizers, caches and all random numbers are restored on the way out.
    """
    with ExitStack() as stack:
        stack.callback(restore_random_state, random_state())
        stack.enter_context(eval_mode(module))
        stack.enter_context(quantizers_off(module))
        stack.enter_context(silent(module))
        for config in _configs(module):
            stack.callback(setattr, config, "use_cache", config.use_cache)
            config.use_cache = False
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        if any(_is_compiled(child) for child in module.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code would not see blocks answered
        stack.enter_context(torch.autocast(device_of(module).type, enabled=False))
        stack.enter_context(torch.no_grad())
        yield


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _configs(module: nn.Module) -> list[Any]:
    """The configs of transformers that would keep keys and values of a forward pass, each once."""
    found = {id(c): c for m in module.modules() if getattr(c := getattr(m, "config", None), "use_cache", False) is True}
    return list(found.values())
