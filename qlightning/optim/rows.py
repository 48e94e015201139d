"""The rows of a sharded weight that one process holds (FSDP2 cuts dimension 0)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from qlightning.numerics.granularity import Granularity
from qlightning.numerics.scales import Grid


class Rows(NamedTuple):
    """Which rows of a weight's matrix are here.

    Attributes:
        matrix: The matrix as a DTensor, sharded on dimension 0.
        start: The first row.
        group: The processes that hold it together.
    """

    matrix: Any
    start: int
    group: Any

    @classmethod
    def of(cls, name: str, matrix: Any, parameter: Any) -> "Rows":
        """Of a weight's matrix, which is a view of its parameter.

        Raises:
            ValueError: Rows of the matrix are not what the parameter is cut into.
        """
        if not matrix.placements[0].is_shard(0) or len(matrix.placements) > 1:
            raise ValueError(
                f"{name} is sharded, and not by its output channels: train with Trainer(strategy='ddp') or on one "
                f"device, or leave it in float, rules={{{name.rpartition('.')[0]!r}: None}}"
            )
        mesh, unit = parameter.device_mesh, matrix.shape[0] // parameter.shape[0]
        each = -(-parameter.shape[0] // mesh.size()) * unit
        return cls(matrix, min(mesh.get_local_rank() * each, matrix.shape[0]), mesh.get_group())

    @property
    def here(self) -> Tensor:
        """The rows, outside autograd."""
        local: Tensor = self.matrix.to_local().detach()
        return local

    def cut(self, whole: Tensor) -> Tensor:
        """These rows of what has as many rows as the matrix."""
        return whole[self.start : self.start + len(self.here)]

    def cut_grid(self, name: str, grid: Grid, granularity: Granularity) -> Grid:
        """The grid of these rows from the grid of the whole.

        Raises:
            ValueError: A block lies on both sides of a border.
        """
        shared = granularity.shared_rows
        if shared is None:
            return grid
        held = len(self.here)
        if self.start % shared or held % shared:
            raise ValueError(
                f"{name}: blocks of {shared} rows lie across the border of two shards: train with "
                "Trainer(strategy='ddp'), or quantize it by channel or group, for example 'int4-g128'"
            )
        mine = slice(self.start // shared, (self.start + held) // shared)
        scale, zero, tensor_scale, inner = grid
        return Grid(
            scale[mine], None if zero is None else zero[mine], tensor_scale, None if inner is None else inner[mine]
        )

    def gathered(self, rows: Tensor) -> Tensor:
        """What all processes have of something with a row for each of the matrix's, on the CPU."""
        parts: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(parts, rows.cpu(), group=self.group)
        return torch.cat(parts)

    def pooled(self, means: Sequence[float]) -> list[float]:
        """Means over the elements here as means over all."""
        here = self.here
        sums = torch.tensor(means, dtype=torch.float64, device=here.device).nan_to_num() * here.numel()
        dist.all_reduce(sums, group=self.group)
        found: list[float] = (sums / self.matrix.numel()).tolist()
        return found


def shard_like(parameter: Any, rows: Tensor) -> Any:
    """A DTensor laid out as a parameter is, of a matrix's rows that are here."""
    from torch.distributed.tensor import DTensor

    local = rows.reshape(parameter.to_local().shape)
    options = {"run_check": False, "shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, **options)
