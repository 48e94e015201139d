"""A module for a while in another mode, and afterwards exactly as it was, whatever happened inside."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from qlightning.layers.convert import quantizers_of


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode; those that were in eval mode before stay so afterwards."""
    modes = [(child, child.training) for child in module.modules()]  # no dict: the hash of a Metric is its state's
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


@contextmanager
def quantizers_off(module: nn.Module) -> Iterator[None]:
    """No quantizer acts or observes."""
    with _switched(module, enabled=False):
        yield


@contextmanager
def not_observing(module: nn.Module) -> Iterator[None]:
    """Quantizers act or not as before, and none of them learns from what it sees."""
    with _switched(module, enabled=True):
        yield


@contextmanager
def _switched(module: nn.Module, *, enabled: bool) -> Iterator[None]:
    before = [(quantizer, quantizer.enabled, quantizer.observing) for _, quantizer in quantizers_of(module)]
    for quantizer, acted, _ in before:
        quantizer.enabled, quantizer.observing = acted and enabled, False
    try:
        yield
    finally:
        for quantizer, acted, observed in before:
            quantizer.enabled, quantizer.observing = acted, observed


@contextmanager
def silent(module: nn.Module) -> Iterator[None]:
    """What a LightningModule logs goes nowhere; on any other module, nothing changes."""
    with logging_to(module, _nothing, _nothing) if hasattr(module, "training_step") else nullcontext():
        yield


@contextmanager
def logging_to(module: nn.Module, log: Callable[..., None], log_dict: Callable[..., None]) -> Iterator[None]:
    """What a LightningModule logs goes to these functions."""
    own: dict[str, Any] = {name: vars(module)[name] for name in ("log", "log_dict") if name in vars(module)}
    vars(module).update({"log": log, "log_dict": log_dict})
    try:
        yield
    finally:
        del vars(module)["log"], vars(module)["log_dict"]
        vars(module).update(own)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass
