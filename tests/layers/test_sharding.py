"""Sharded parameters seen whole, under FSDP2 and FSDP1."""

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from qlightning.layers.convert import convert
from qlightning.layers.sharding import is_sharded, resting, whole, whole_when_called


def model():
    generator = torch.Generator().manual_seed(3)
    layers = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 7), nn.ReLU()), nn.Linear(7, 2))
    for parameter in layers.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    convert(layers, "int4-channel-lsq")
    return layers


def sharded(kind):
    layers = model()
    if kind == "fsdp1":
        layers[1] = FullyShardedDataParallel(layers[1], device_id=torch.device("cpu"), use_orig_params=True)
        return FullyShardedDataParallel(layers, device_id=torch.device("cpu"), use_orig_params=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(layers[1], mesh=mesh)
    fully_shard(layers, mesh=mesh)
    return layers


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_reading_and_writing(ranks, kind):
    x = torch.randn(4, 6)

    def check():
        root, seen = sharded(kind), {}
        layers = root.module if kind == "fsdp1" else root
        inner = layers[1].module[0] if kind == "fsdp1" else layers[1][0]
        objects = {id(p) for p in root.parameters()}
        for layer in (layers[0], inner, layers[2]):
            with whole(layer, root):
                seen[layer.in_features] = {n: p.detach().clone() for n, p in layer.named_parameters()}
                assert not any(map(is_sharded, layer.parameters()))
                with torch.no_grad():
                    layer.weight.mul_(2)
                    layer.weight_quantizer.scale.value.mul_(2)
        assert kind == "fsdp1" or {id(p) for p in root.parameters()} == objects
        return seen, root(x).detach()

    plain = model()
    wanted = {layer.in_features: dict(layer.named_parameters()) for layer in (plain[0], plain[1][0], plain[2])}
    for seen, y in ranks(2, check):
        for size, parameters in wanted.items():
            assert parameters.keys() == seen[size].keys()
            assert all(torch.equal(seen[size][name], value) for name, value in parameters.items())
        doubled = model()
        for layer in (doubled[0], doubled[1][0], doubled[2]):
            layer.weight.data.mul_(2)
            layer.weight_quantizer.scale.value.data.mul_(2)
        torch.testing.assert_close(y, doubled(x))


def test_a_module_that_is_whole_stays_as_it_is():
    layers = model()
    before = [id(p) for p in layers.parameters()]
    with whole(layers, layers):
        assert [id(p) for p in layers.parameters()] == before


def test_units_that_rest(ranks):
    """A rank may run them alone, on whole parameters that it changes; afterwards they gather what was written."""
    x = torch.randn(4, 6)

    def check():
        layers, mesh = model(), init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(layers[1], mesh=mesh)
        fully_shard(layers, mesh=mesh)
        first = layers(x).detach()  # FSDP2's own, after which the root stays gathered
        with resting(layers), whole(layers, without=[layers[1]]):
            assert is_sharded(layers[1][0].weight)
            with whole_when_called([layers[1]]):
                again = layers(x).detach()
            assert is_sharded(layers[1][0].weight)
            with whole(layers[1]), torch.no_grad():
                for _ in range(dist.get_rank()):
                    layers(x)
                layers[1][0].weight.mul_(2)
                layers[2].weight.mul_(2)
        assert is_sharded(layers[2].weight)
        return first, again, layers(x).detach()

    doubled = model()
    for layer in (doubled[1][0], doubled[2]):
        layer.weight.data.mul_(2)
    for first, again, y in ranks(2, check):
        assert torch.equal(first, again)
        torch.testing.assert_close(first, model()(x))
        torch.testing.assert_close(y, doubled(x))
