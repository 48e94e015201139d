"""Sharding with FSDP2, block by block."""

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult

from qlightning.layers.coverage import public_name

_LISTS = nn.ModuleList | nn.ModuleDict


def shard(roots: Sequence[nn.Module], units: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Shard parameters on dimension 0, gathered and let go again unit by unit.

    Args:
        roots: Modules that are called as a whole.
        units: The modules inside them that are gathered one by one; what is in no unit is gathered with its root.
        mesh: The processes in one dimension, or in two: copies, and the processes between which each is cut.

    Raises:
        ValueError: Two units share a parameter.
    """
    parts = [*sorted(units, key=lambda unit: sum(1 for _ in unit.modules())), *roots]  # what lies inside comes first
    _check_apart(parts)
    apart = _dtypes_apart(roots, mesh)
    for part in parts:
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh, reshard_after_forward=True, shard_placement_fn=apart)


def _dtypes_apart(roots: Sequence[nn.Module], mesh: DeviceMesh) -> Callable[[nn.Parameter], Any] | None:
    """FSDP2 reduces gradients of one dtype together; those of another, such as float32 scales beside bfloat16 weights,
    are a group of their own if they have process groups of their own."""
    parameters = [p for root in roots for p in root.parameters() if p.is_floating_point()]
    sizes = {dtype: sum(p.numel() for p in parameters if p.dtype == dtype) for dtype in {p.dtype for p in parameters}}
    if len(sizes) < 2 or mesh.size() < 2:
        return None
    _, *others = sorted(sizes, key=lambda dtype: (-sizes[dtype], str(dtype)))
    infos = {dtype: _like(mesh) for dtype in others}
    return lambda p: ShardPlacementResult(None, infos[p.dtype]) if p.dtype in infos else None


def _like(mesh: DeviceMesh) -> FSDPMeshInfo:
    """The same processes, in process groups of their own; of one name, so that norms of both add up."""
    if mesh.ndim == 1:
        group = dist.new_group(mesh.mesh.tolist())
        same = DeviceMesh.from_group(group, mesh.device_type, mesh_dim_names=mesh.mesh_dim_names)
        return FSDPMeshInfo(same, shard_mesh_dim=0)
    groups = [_own_group(mesh, dimension) for dimension in range(2)]
    same = DeviceMesh.from_group(groups, mesh.device_type, mesh=mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
    return HSDPMeshInfo(same, shard_mesh_dim=1, replicate_mesh_dim=0)


def _own_group(mesh: DeviceMesh, dimension: int) -> Any:
    """A new process group of this process along one dimension of a mesh; all processes create all of them."""
    lines = mesh.mesh.movedim(dimension, -1).flatten(0, -2).tolist()
    groups = [dist.new_group(line) for line in lines]
    return next(group for group, line in zip(groups, lines, strict=True) if dist.get_rank() in line)


def _check_apart(parts: Sequence[nn.Module]) -> None:
    """Every parameter in one unit: the innermost part around each module that owns it has to be the same."""
    inside: dict[int, int] = {}
    for number, part in enumerate(parts):  # units come before what they lie in
        for module in part.modules():
            inside.setdefault(id(module), number)
    home: dict[int, tuple[int, str]] = {}
    for part in parts:
        for name, module in part.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                where = inside[id(module)], f"{name}.{own}".lstrip(".")
                first = home.setdefault(id(parameter), where)
                if first[0] != where[0]:
                    raise ValueError(
                        f"{first[1]} and {where[1]} are one parameter, but lie in modules that are gathered apart: put "
                        "both into one submodule, or name the modules that are gathered, QuantizedFSDP(units=[...])"
                    )


def units_of(module: nn.Module, names: Sequence[str] | None = None) -> list[nn.Module]:
    """The modules inside it that are gathered one by one: the members of every outermost list or sequence.

    Args:
        module: The module.
        names: Globs of the units' names or "type:Class", instead; of modules inside one another, the outermost.

    Raises:
        ValueError: A name matches nothing.
    """
    if names is None:
        return list(_members(module))
    found: dict[int, nn.Module] = {}
    for pattern in names:
        matching = [child for name, child in module.named_modules() if _matches(child, public_name(name), pattern)]
        if not matching:
            raise ValueError(f"units={list(names)!r}: {pattern!r} matches no module, see module.named_modules()")
        found |= {id(child): child for child in matching if child is not module}
    inner = {id(child) for unit in found.values() for child in unit.modules() if child is not unit}
    return [unit for key, unit in found.items() if key not in inner]


def _matches(module: nn.Module, name: str, pattern: str) -> bool:
    if pattern.startswith("type:"):
        return any(cls.__name__ == pattern.removeprefix("type:") for cls in type(module).__mro__)
    return fnmatchcase(name, pattern)


def _members(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, _LISTS):
            yield from roots_of(child)
        elif isinstance(module, nn.Sequential):
            yield from (child,) if any(True for _ in child.parameters()) else ()
        else:
            yield from _members(child)


def roots_of(module: nn.Module) -> Iterator[nn.Module]:
    """The modules directly inside one that are called: children, and the members of lists, which nobody calls."""
    for child in module.children():
        if isinstance(child, _LISTS):
            yield from roots_of(child)
        elif any(True for _ in child.parameters()):
            yield child
