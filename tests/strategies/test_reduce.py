"""Gradients reduced in eight bits: right on average, never further off than a step, and different on every rank."""

import torch
import torch.distributed as dist

from qlightning.strategies.reduce import EightBitReduceScatter, reduce_with

BLOCK, ELEMENTS, DRAWS = 32, 70, 400


def part_of(rank, ranks):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(ranks * ELEMENTS, generator=generator)


def reduced(draws=DRAWS):
    """The result of every draw, and the exact mean."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    reduce, own = EightBitReduceScatter(block=BLOCK), torch.empty(ELEMENTS)
    found = []
    for step in range(draws):
        reduce.begin(step)
        reduce(own, part_of(rank, ranks), dist.group.WORLD, dist.ReduceOp.AVG)
        found.append(own.clone())
    parts = torch.stack([part_of(other, ranks).view(ranks, -1)[rank] for other in range(ranks)])
    return torch.stack(found), parts


def test_unbiased_and_bounded(ranks):
    for found, parts in ranks(2, reduced):
        padded = torch.nn.functional.pad(parts, (0, -ELEMENTS % BLOCK)).view(len(parts), -1, BLOCK)
        step = (padded.abs().amax(-1, keepdim=True) / 127).expand_as(padded).flatten(1)[:, :ELEMENTS].mean(0)
        error = found - parts.mean(0)
        assert (error.abs() <= step * 1.001).all()
        assert error.std() > 0.1 * step.mean()  # it is rounded, and anew each time
        # the mean of n draws of at most a step has a standard deviation of at most step / sqrt(n)
        assert (error.mean(0).abs() < 5 * step / DRAWS**0.5).all()
        assert (error.mean(0) / step).mean().abs() < 5 / (DRAWS * ELEMENTS) ** 0.5


def test_ranks_round_independently_and_a_step_repeats(ranks):
    def check():
        reduce, found = EightBitReduceScatter(block=BLOCK), []
        same = torch.linspace(-1, 1, 2 * ELEMENTS)
        for step in (3, 4, 3):
            reduce.begin(step)
            codes = reduce._rounded(same.view(2, ELEMENTS)[:, :64], dist.get_rank())[0]
            found += [codes, reduce._rounded(same.view(2, ELEMENTS)[:, :64], dist.get_rank())[0]]
        return found

    one, other = ranks(2, check)
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0], one[1])  # another unit of the same backward pass
    assert not torch.equal(one[0], one[2])
    assert torch.equal(one[0], one[4])
    assert torch.equal(one[1], one[5])


def test_infinity_is_not_lost(ranks):
    def check():
        own, given = torch.empty(4), torch.ones(8)
        given[1] = torch.inf if dist.get_rank() else 1.0
        EightBitReduceScatter(block=4)(own, given, dist.group.WORLD, dist.ReduceOp.SUM)
        return own

    one, other = ranks(2, check)
    assert not one.isfinite().any()
    assert torch.equal(other, torch.full((4,), 2.0))


def test_fsdp2_reduces_with_it(ranks, kit):
    """Its bytes are counted: a quarter of float32's, and a scale per block."""

    def check():
        losses, sent = [], []
        exchange = dist.all_to_all_single

        def count(output, input, **options):
            sent.append(input.nbytes)
            return exchange(output, input, **options)

        for eight in (True, False):
            net = kit.converted("int8-channel")
            _, gathers = kit.sharded(net)
            if eight:
                reduce_with(net, EightBitReduceScatter(block=64))
            dist.all_to_all_single = count
            losses.append(kit.train(net, 2, dist.get_rank(), gathers))
            dist.all_to_all_single = exchange
        elements = sum(parameter.numel() for parameter in net.parameters())
        return losses, sum(sent) / (4 * elements)

    for (ours, expected), per_element in ranks(2, check):
        assert torch.equal(ours[0], expected[0])
        assert not torch.equal(ours[1:], expected[1:])
        assert torch.allclose(ours, expected, rtol=1e-3)
        assert 1 < per_element < 1.25  # little blocks, some of them padded
