"""The order is a function of (seed, epoch), the position survives, the global random numbers are left alone."""

import subprocess
import sys
from itertools import chain

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset, default_collate

from qlightning.data.loader import Loader, Order


class Marked(Dataset[int]):
    """Items that depend on the epoch."""

    def __init__(self, epoch: int = 0) -> None:
        self.epoch = epoch

    def at_epoch(self, epoch: int) -> "Marked":
        return Marked(epoch)

    def __len__(self) -> int:
        return 13

    def __getitem__(self, index: int) -> int:
        return 1000 * self.epoch + index


def batches(loader: Loader, epoch: int = 0) -> list[list[int]]:
    loader.order.set_epoch(epoch)
    return [batch.tolist() for batch in loader]


def make(**options) -> Loader:
    return Loader(range(13), **{"batch_size": 4, "shuffle": True, "seed": 5, **options})


def test_in_order_it_is_the_loader_of_torch():
    data = TensorDataset(torch.arange(13), torch.randn(13, 2))
    for drop_last in (False, True):
        ours = list(Loader(data, batch_size=4, drop_last=drop_last))
        torchs = list(DataLoader(data, batch_size=4, drop_last=drop_last))
        assert len(ours) == len(torchs) == 4 - drop_last
        assert all(torch.equal(a, b) for x, y in zip(ours, torchs, strict=True) for a, b in zip(x, y, strict=True))


def test_order_depends_on_seed_and_epoch_alone():
    first = batches(make())
    assert sorted(chain(*first)) == list(range(13))
    torch.manual_seed(9)
    assert batches(make()) == first
    assert batches(make(num_workers=2)) == first
    loader = make()
    epochs = [batches(loader, epoch) for epoch in (0, 1, 2, 0)]
    assert epochs[3] == epochs[0] == first
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert batches(make(seed=6)) != first


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_the_global_generator_alone(workers):
    before = torch.get_rng_state()
    batches(make(num_workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("length", [1, 2, 12, 13])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_shares_are_those_of_the_distributed_sampler(length, ranks):
    for rank in range(ranks):
        torchs = DistributedSampler(range(length), ranks, rank, shuffle=False)
        ours = Order(length, shard=(rank, ranks))
        assert list(ours) == list(torchs)
        assert len(ours) == len(torchs)


def test_uneven_shares_hold_each_sample_once():
    shares = [Order(13, shuffle=True, shard=(rank, 4), even=False) for rank in range(4)]
    assert sorted(i for share in shares for i in share) == list(range(13))
    assert [len(share) for share in shares] == [len(list(share)) for share in shares] == [4, 3, 3, 3]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4])
def test_continues_where_it_stopped(stop, workers):
    whole = batches(make(), 3)
    loader = make(num_workers=workers)
    loader.order.set_epoch(3)
    iterator = iter(loader)
    assert [next(iterator).tolist() for _ in range(stop)] == whole[:stop]
    state = loader.state_dict()
    resumed = make(num_workers=workers)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    if stop == 0:  # nothing was given out: the epoch is not part of the position yet
        resumed.order.set_epoch(3)
    assert [batch.tolist() for batch in resumed] == whole[stop:]
    assert batches(resumed, 3) == whole  # a position counts once
    assert batches(resumed, 4) == batches(make(), 4)


def test_position_belongs_to_its_epoch():
    loader = make()
    next(iter(loader))
    resumed = make()
    resumed.load_state_dict(loader.state_dict())
    assert batches(resumed, 1) == batches(make(), 1)


def test_position_counts_samples_over_batch_sizes_and_ranks():
    one = make(batch_size=4, shard=(0, 1))
    iterator = iter(one)
    seen = next(iterator).tolist() + next(iterator).tolist()
    left = []
    for rank in range(2):
        two = make(batch_size=2, shard=(rank, 2))
        two.load_state_dict(one.state_dict())
        left += chain(*(batch.tolist() for batch in two))
    assert sorted({*seen, *left}) == list(range(13))
    assert not set(seen) & set(left[:-1])  # one sample pads the second rank


@pytest.mark.parametrize("workers", [0, 2])
def test_items_may_depend_on_the_epoch(workers):
    loader = Loader(Marked(), batch_size=5, num_workers=workers)
    assert batches(loader, 7) == [[7000 + i for i in range(k, min(k + 5, 13))] for k in (0, 5, 10)]
    assert batches(loader, 0)[0] == [0, 1, 2, 3, 4]


def test_collate_fn():
    def double(samples: list[int]) -> Tensor:
        return 2 * default_collate(samples)

    assert batches(Loader(range(3), batch_size=2, collate_fn=double)) == [[0, 2], [4]]


@pytest.mark.parametrize(("change", "word"), [({"seed": 6}, "seed=5"), ({"data": range(14)}, "length")])
def test_refuses_the_position_in_another_order(change, word):
    loader = make()
    next(iter(loader))
    data = change.pop("data", range(13))
    other = Loader(data, **{"batch_size": 4, "shuffle": True, "seed": 5, **change})
    with pytest.raises(ValueError, match=word):
        other.load_state_dict(loader.state_dict())


@pytest.mark.parametrize(
    ("data", "options", "correction"),
    [
        (range(0), {"batch_size": 2}, "at least one sample"),
        (range(3), {"batch_size": 0}, "batch_size=8"),
        (range(3), {"batch_size": 4, "drop_last": True}, "batch_size=3"),
    ],
)
def test_errors_show_the_corrected_call(data, options, correction):
    with pytest.raises(ValueError, match=correction):
        Loader(data, **options)


def test_the_package_does_not_import_lightning():
    code = "import sys, qlightning.data as d; d.Loader; print('lightning' in sys.modules, 'datasets' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False False\n"
    )
    with pytest.raises(AttributeError, match="NoSuch"):
        _ = __import__("qlightning.data").data.NoSuch
