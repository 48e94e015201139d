"""Masks and gradients of scales on the shards equal those of whole weights."""

import torch
import torch.distributed as dist

from qlightning.strategies.shard_gradients import finished_on_shards

SPECS = ("int2-channel-clip", "int3-channel-asym-lsq", "int2-tensor-lsq", "int4-g2-lsq")


def gradients(kit, spec, *, codes, steps):
    """Of so many accumulated backward passes."""
    net = kit.converted(spec)
    _, gathers = kit.sharded(net, codes=codes)
    for step in range(steps):
        torch.manual_seed(10 * step + dist.get_rank())
        loss = net(torch.randn(4, 32)).square().sum()
        with finished_on_shards(gathers):
            loss.backward()
    return {name: parameter.grad.full_tensor() for name, parameter in net.named_parameters()}


def test_accumulated_gradients(ranks, kit):
    def check():
        return {spec: [gradients(kit, spec, codes=codes, steps=2) for codes in (True, False)] for spec in SPECS}

    for found in ranks(3, check):
        for spec, (ours, expected) in found.items():
            assert ours.keys() == expected.keys()
            for name, gradient in expected.items():
                if "scale" not in name:  # a mask commutes with the mean
                    assert torch.equal(ours[name], gradient), (spec, name)
                assert torch.allclose(ours[name], gradient, rtol=1e-4, atol=1e-6), (spec, name)
                assert gradient.any(), (spec, name)
