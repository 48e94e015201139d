"""Random rounding on several processes: alike where they hold one weight, of their own where they see other values."""

import torch
from torch import distributed as dist
from torch import nn

import qlightning
from qlightning.layers.convert import quantizers_of
from qlightning.methods.gaussws import GaussWS
from qlightning.numerics.rounding import Random


def layer(**scheme):
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(32, 16))
    qlightning.convert(module, {"*": scheme})
    return module.train()


def test_weights_alike_and_activations_apart(ranks):
    x = torch.rand(8, 32, generator=torch.Generator().manual_seed(2))

    def check():
        dist.barrier()
        torch.manual_seed(100 + dist.get_rank())
        weight, inputs = layer(weight="int3-channel-sr"), layer(weight="int8", input="int3-token-sr")
        outputs = layer(weight="int8", output="int3-token-sr")
        return [module(x).detach() for module in (weight, inputs, outputs)], inputs.eval()(x).detach()

    (first, deployed), (second, also_deployed) = ranks(2, check)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    assert not torch.equal(first[2], second[2])
    assert torch.equal(deployed, also_deployed)
    alone = [layer(weight="int8", input="int3-token-sr")(x).detach()]
    assert torch.equal(alone[0], first[1])  # the first process draws what one alone draws


def test_noise_on_a_weight_is_one_noise(ranks):
    def check():
        torch.manual_seed(dist.get_rank())
        module = nn.Sequential(nn.Linear(32, 32))
        torch.manual_seed(0)
        nn.init.normal_(module[0].weight)
        (callback, *_) = GaussWS().callbacks()
        qlightning.convert(module, callback.rules)
        drawing = [child for child in module.modules() if isinstance(child, Random)]
        assert drawing
        quantizer = dict(module[0].quantizers())["weight"]
        return quantizer.train()(module[0].weight).detach()

    first, second = ranks(2, check)
    assert torch.equal(first, second)


def test_a_step_is_damped_by_the_values_of_all(ranks):
    """LSQ divides the gradient of a step by sqrt(values that share it), which are in parts here."""
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))

    def gradient(rows):
        module = layer(weight="int8", input="int4-tensor-lsq")
        (quantizer,) = (q for name, q in quantizers_of(module) if name.endswith("input_quantizer"))
        quantizer.initialize(x)
        module(rows).square().mean().backward()
        return quantizer.scale.value.grad

    def check():
        mine = gradient(x[dist.get_rank() :: 2])
        dist.all_reduce(mine)
        return mine / 2

    together = ranks(2, check)
    torch.testing.assert_close(together[0], gradient(x))
