"""The mean of a value, apart for each bucket that it falls into."""

import torch
from torch import Tensor
from torchmetrics import Metric


class BucketedMean(Metric):
    """Means of values per bucket, exact over batches of any size and over processes.

    >>> mean = BucketedMean(3)
    >>> mean.update(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2]))
    >>> mean.compute()
    tensor([2., nan, 5.])

    Args:
        buckets: Number of buckets.
    """

    higher_is_better = None
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, buckets: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(buckets), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(buckets), dist_reduce_fx="sum")

    def update(self, values: Tensor, buckets: Tensor) -> None:
        """Take in values.

        Args:
            values: (N,) floats.
            buckets: (N,) the bucket of each value, integers.
        """
        self.total.index_add_(0, buckets, values.to(self.total.dtype))
        self.count.index_add_(0, buckets, torch.ones_like(values, dtype=self.count.dtype))

    def compute(self) -> Tensor:
        """(buckets,) the means; NaN where a bucket saw nothing."""
        return self.total / self.count
