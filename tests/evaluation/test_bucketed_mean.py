import pytest
import torch

from qlightning.evaluation import BucketedMean


def test_means_equal_a_loop_over_batches_of_any_size():
    generator = torch.Generator().manual_seed(0)
    values, buckets = torch.rand(50, generator=generator), torch.randint(4, (50,), generator=generator)
    mean = BucketedMean(5)
    for part in (slice(0, 7), slice(7, 8), slice(8, 50)):
        mean.update(values[part], buckets[part])
    expected = [values[buckets == i].mean().item() for i in range(4)]
    assert mean.compute()[:4].tolist() == pytest.approx(expected, rel=1e-6)
    assert mean.compute()[4].isnan()


def test_low_precision_values_are_summed_in_float32():
    mean = BucketedMean(1)
    for _ in range(400):
        mean.update(torch.ones(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.long))
    assert mean.compute().dtype == torch.float32
    assert mean.total.item() == 400  # a bfloat16 sum would have stopped at 256
