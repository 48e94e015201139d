"""The rows that a process holds, of two; whole runs are in tests/ranks/test_weights_on_shards.py."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from qlightning.numerics import PerBlock, PerChannel, PerTensor
from qlightning.numerics.scales import Grid
from qlightning.optim.rows import Rows, shard_like


def test_rows_of_two(ranks):
    whole = torch.arange(20.0).view(5, 4)  # three rows and two

    def check():
        matrix = distribute_tensor(whole, init_device_mesh("cpu", (2,)), [Shard(0)])
        rows = Rows.of("layer.weight", matrix, matrix)
        assert torch.equal(rows.cut(whole), rows.here)
        assert torch.equal(rows.gathered(rows.here > 7), whole > 7)
        assert rows.pooled([float(rows.here.mean()), 1.0]) == [pytest.approx(float(whole.mean())), 1.0]
        assert torch.equal(shard_like(matrix, rows.here * 2).full_tensor(), whole * 2)
        scales = Grid(whole[:, :1])
        assert torch.equal(rows.cut_grid("w", scales, PerChannel()).scale, rows.here[:, :1])
        assert rows.cut_grid("w", scales, PerTensor()) is scales
        with pytest.raises(ValueError, match="blocks of 2 rows lie across the border"):
            rows.cut_grid("w", scales, PerBlock(2, 2))
        across = distribute_tensor(whole, matrix.device_mesh, [Shard(1)])
        with pytest.raises(ValueError, match=r"not by its output channels.*rules=\{'layer': None\}"):
            Rows.of("layer.weight", across, across)
        return rows.start, len(rows.here), dist.get_rank()

    assert ranks(2, check) == [(0, 3, 0), (3, 2, 1)]
