"""Statistics of values that are spread over ranks, as torch finds them of all."""

import torch
import torch.distributed as dist

from qlightning.numerics.statistics import extremes, mean_magnitude
from qlightning.strategies.pool import OverRanks

RANKS = 3


def test_order_statistics_of_all_ranks(ranks):
    """Exactly the elements that torch picks, whatever lies where."""

    def check():
        torch.manual_seed(2)
        values = torch.cat(
            [torch.randn(40).abs(), torch.zeros(5), torch.tensor([torch.inf, 1e-40, 1e30]), torch.ones(9)]
        )
        mine = values.tensor_split([3, 3])[dist.get_rank()][None]
        pool = OverRanks(dist.group.WORLD, len(values))
        return [torch.equal(pool.smallest(mine, k)[0, 0], values.kthvalue(k).values) for k in range(1, len(values) + 1)]

    assert all(all(found) for found in ranks(RANKS, check))


def test_means_and_extremes(ranks):
    def check():
        torch.manual_seed(2)
        values = torch.randn(1, 10_007) * torch.rand(1, 10_007).exp()
        mine = values.tensor_split([1, 6_000], dim=1)[dist.get_rank()]
        pool = OverRanks(dist.group.WORLD, values.numel())
        ends = [torch.equal(a, b) for a, b in zip(extremes(mine, pool), extremes(values), strict=True)]
        return [*ends, torch.equal(mean_magnitude(mine, pool), mean_magnitude(values))]

    assert ranks(RANKS, check) == [[True] * 3] * RANKS


def test_not_a_number_is_infinite(ranks):
    def check():
        pool = OverRanks(dist.group.WORLD, 6)
        mine = torch.full((1, 2), torch.nan if dist.get_rank() == 1 else 1.0)
        return mean_magnitude(mine, pool).item(), extremes(mine, pool)[1].item()

    assert ranks(RANKS, check) == [(torch.inf, torch.inf)] * RANKS
