"""Sharded modules seen whole: for whatever must look at a parameter outside of a forward pass.

In a forward pass FSDP gathers what a layer needs, and a quantizer sees the whole weight. Between passes a process holds
its share: a DTensor (FSDP2), or a piece of a flat buffer (FSDP1). Statistics of a share are not those of the weight.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlightning.layers.coverage import public_name
from qlightning.layers.layer import Twin


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process may hold but a share of it (a DTensor)."""
    return hasattr(tensor, "placements")


def refuse_parallel(module: nn.Module) -> None:
    """Refuse converted layers whose weight takes part in a product as a shard, by row or by column.

    Raises:
        ValueError: A layer of tensor parallelism.
    """
    units = [name for name, child in module.named_modules() if _is_unit_of_fsdp2(child)]
    for name, layer in module.named_modules():
        if not isinstance(layer, Twin):
            continue
        gathered = any(not unit or name == unit or name.startswith(f"{unit}.") for unit in units)
        for parameter in layer.parameters(recurse=False):
            if is_sharded(parameter) and not (gathered and _cuts(parameter) <= 1):
                raise ValueError(in_parallel(public_name(name)))


def in_parallel(name: str) -> str:
    """What is said of a layer that multiplies with a shard of its weight."""
    return (
        f"{name} multiplies with a shard of its weight (a DTensor, row- or column-parallel), whose scale would be that "
        "of the shard: shard over data alone, ModelParallelStrategy(tensor_parallel_size=1, data_parallel_size=...) or "
        f"QuantizedFSDP(), or leave the layer in float, rules={{{name!r}: None}}"
    )


def refuse_flat(root: nn.Module, what: str) -> None:
    """Refuse modules that FSDP1 has wrapped, for whoever runs parts of them.

    Args:
        root: What a strategy runs.
        what: The part that cannot do with it.

    Raises:
        ValueError: FSDP1 has.
    """
    if _wrapped(root):
        raise ValueError(
            f"{what} runs a model block by block, and FSDP1 (strategy='fsdp') gathers nothing for that: use "
            "strategy='ddp' or qlightning.QuantizedFSDP(), or calibrate the model before the fit and leave it out, "
            "qlightning.solvers.calibrate(module, batches, solver)"
        )


def _cuts(parameter: Any) -> int:
    return sum(not placement.is_replicate() for placement in parameter.placements)


def _is_unit_of_fsdp2(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


@contextmanager
def resting(module: nn.Module) -> Iterator[None]:
    """A context in which FSDP2's units in a module gather nothing when they run, and hold their shares before it.

    For whoever runs parts of it a different number of times in each process, and holds them `whole` meanwhile.
    """
    kept: list[tuple[Any, list[Any]]] = []
    for unit in module.modules():
        if _is_unit_of_fsdp2(unit):
            unit.reshard()  # type: ignore[operator]  # after evaluation a root is still gathered
            for hooks in (unit._forward_pre_hooks, unit._forward_hooks):
                kept.append((hooks, list(hooks.items())))
                for key, hook in kept[-1][1]:
                    if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp"):
                        del hooks[key]
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.clear()
            hooks.update(before)


@contextmanager
def whole_when_called(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Each module is `whole` from when it is called until it returns."""
    with ExitStack() as inside, ExitStack() as hooks:
        for module in modules:
            entering = module.register_forward_pre_hook(lambda m, args: inside.enter_context(whole(m)), prepend=True)
            leaving = module.register_forward_hook(lambda m, args, output: inside.close())
            hooks.callback(entering.remove)
            hooks.callback(leaving.remove)
        yield


@contextmanager
def whole(module: nn.Module, root: nn.Module | None = None, *, without: Iterable[nn.Module] = ()) -> Iterator[None]:
    """A context in which every parameter in a module is a whole plain tensor; what is written into it is kept.

    Every process must enter it, and must write the same. A module that is not sharded is left as it is.

    Args:
        module: A converted layer, or whatever holds some.
        root: What the strategy runs; it tells which unit of FSDP1 a layer belongs to.
        without: Modules in it that stay as they are.
    """
    left = {id(child) for part in without for child in part.modules()}
    with ExitStack() as stack:
        for unit in _units_of_fsdp1(module, root):
            from torch.distributed.fsdp import FullyShardedDataParallel

            stack.enter_context(FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=True))
        shares: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        known: dict[int, nn.Parameter] = {}
        for owner in module.modules():
            for name, share in owner._parameters.items() if id(owner) not in left else ():
                if share is not None and is_sharded(share):
                    if id(share) not in known:
                        known[id(share)] = _gathered(share)
                    shares.append((owner, name, share, known[id(share)]))
                    owner._parameters[name] = known[id(share)]
        versions = {key: full._version for key, full in known.items()}
        try:
            yield
        finally:
            for owner, name, share, full in shares:
                owner._parameters[name] = share
                if full._version != versions.pop(id(share), full._version):
                    _scatter(full, share)


def _gathered(share: Any) -> nn.Parameter:
    return nn.Parameter(share.detach().full_tensor(), requires_grad=share.requires_grad)


@torch.no_grad()
def _scatter(full: Tensor, share: Any) -> None:
    share.copy_(shared_out(full, share))


def shared_out(full: Tensor, like: Any) -> Tensor:
    """A whole tensor, which every process has, as the DTensor that `like` is."""
    from torch.distributed.tensor import distribute_tensor

    whole_one = full.detach().to(like.device)
    return distribute_tensor(whole_one, like.device_mesh, like.placements, src_data_rank=None)


def _units_of_fsdp1(module: nn.Module, root: nn.Module | None) -> list[nn.Module]:
    """The root and the units in which parameters of a module lie; empty where FSDP1 has not wrapped it."""
    if root is None or not _wrapped(root):
        return []
    inside = {id(child) for child in module.modules()}
    units = [root] if _is_unit(root) else []
    for unit in root.modules():
        if _is_unit(unit) and unit is not root and any(id(child) in inside for child in _of_unit(unit)):
            units.append(unit)
    return units


def _is_unit(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(module, FullyShardedDataParallel)


def _wrapped(root: nn.Module) -> bool:
    """Whether FSDP1 has."""
    return any(_is_unit(module) for module in root.modules())


def _of_unit(unit: nn.Module) -> Iterator[nn.Module]:
    """The modules whose parameters a unit of FSDP1 holds: all in it that no inner unit holds."""
    for child in unit.children():
        if not _is_unit(child):
            yield child
            yield from _of_unit(child)
