"""Several processes: codes are gathered, and the numbers are those of whole weights."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import qlightning
from qlightning.layers.convert import quantizers_of


def run(kit, spec, *, codes):
    """(mean losses, parameters) of a sharded run."""
    net = kit.converted(spec)
    _, gathers = kit.sharded(net, codes=codes)
    losses = kit.train(net, dist.get_world_size(), dist.get_rank(), gathers)
    assert all(gather.coded for gather in gathers)
    assert len(gathers) == 2 * codes
    dist.all_reduce(losses)
    return losses / dist.get_world_size(), kit.whole(net)


def compare(kit, specs):
    return {spec: [run(kit, spec, codes=codes) for codes in (True, False)] for spec in specs}


@pytest.mark.parametrize("count", [2, 3])
def test_bits_of_a_full_gather(ranks, kit, count):
    """Trained on gathered codes as FSDP2 trains on gathered weights; with 3 ranks, shards are uneven."""
    specs = (
        ("int8-channel", "int4-g2-asym", "nvfp4", "int8-tensor", "ternary", "binary")
        if count == 3
        else ("int4-g2", "nf4-g2")
    )
    for found in ranks(count, compare, kit, specs):
        for spec, ((losses, trained), (expected, reference)) in found.items():
            assert torch.equal(losses, expected), spec
            assert all(torch.equal(trained[name], reference[name]) for name in reference), spec


def test_losses_of_one_process(ranks, kit):
    specs = ["int8-channel", "int8-channel-lsq", "int8-tensor-lsq", "int8-channel-asym-lsq", "ternary-clip"]
    for found in ranks(3, lambda: {spec: run(kit, spec, codes=True) for spec in specs}):
        for spec, (losses, trained) in found.items():
            one = kit.converted(spec)
            assert torch.allclose(losses, kit.train(one), rtol=1e-5), spec
            for name, parameter in one.named_parameters():
                assert torch.allclose(trained[name], parameter, rtol=1e-4, atol=1e-6), (spec, name)


def test_phases(ranks, kit):
    """Float, a ramp, and full strength: what is gathered follows the quantizer, and the numbers stay those of FSDP2."""

    def check():
        found = []
        for codes in (True, False):
            net = kit.converted("int4-g2-lsq")
            _, gathers = kit.sharded(net, codes=codes)
            coded, losses = [], []
            for strength in (None, 0.5, 1.0):
                for _, quantizer in quantizers_of(net):
                    quantizer.enabled = strength is not None
                    quantizer.set_strength(strength or 1.0)
                losses.append(kit.train(net, 2, dist.get_rank(), gathers, steps=2))
                coded.append([gather.coded for gather in gathers])
            found.append((torch.cat(losses), kit.whole(net)))
            assert coded == [[False] * 2, [False] * 2, [True] * 2] or not codes
        return found

    for (losses, trained), (expected, reference) in ranks(2, check):
        assert torch.equal(losses[:5], expected[:5])
        assert torch.allclose(losses, expected, rtol=1e-6)
        assert all(torch.allclose(trained[name], reference[name], rtol=1e-4, atol=1e-7) for name in reference)


def moved(spec, dtype=torch.float32):
    """Bytes that a rank sends in one step of training, but for gradients."""
    net = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(2))).to(dtype)
    if spec:
        qlightning.convert(net, spec)
    send, sent = dist.all_gather_single, []

    def count(output_tensor, input_tensor, **options):
        sent.append(input_tensor.nbytes)
        return send(output_tensor, input_tensor, **options)

    from torch.distributed.device_mesh import init_device_mesh

    from qlightning.strategies.plan import Plan
    from qlightning.strategies.shard import shard, units_of

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = Plan(net, ranks=mesh.size())
    shard([net], units_of(net), mesh)
    for gather in plan.attach(net):
        gather.attach()

    def count_reduced(tensor, *arguments, **options):
        sent.append(tensor.nbytes)
        return reduce(tensor, *arguments, **options)

    reduce = dist.all_reduce
    dist.all_gather_single, dist.all_reduce = count, count_reduced
    try:
        net(torch.randn(4, 256, dtype=dtype)).sum().backward()
    finally:
        dist.all_gather_single, dist.all_reduce = send, reduce
    return sum(sent)


def test_bytes_on_the_wire(ranks):
    specs = {"int4-g128": 0.27, "int4-g128-lsq": 0.27, "int8-channel": 0.52, "nvfp4": 0.29, "ternary": 0.14}
    for bf16, *found in ranks(2, lambda: [moved(None, torch.bfloat16), *map(moved, specs)]):
        assert bf16 == 2 * 2 * 2 * 256 * 256 // 2  # two bytes, forward and backward, two layers, on two ranks
        for (spec, most), size in zip(specs.items(), found, strict=True):
            assert size <= most * bf16, spec
