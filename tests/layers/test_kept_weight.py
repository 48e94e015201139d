"""A kept quantized weight gives the bits of one that is made anew, and is made anew when anything changes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlightning import Scheme, convert
from qlightning.adapters import LoRA
from qlightning.layers.kept_weight import KeptWeight

SCHEMES = {
    "group": Scheme("int4-g16"),
    "learned": Scheme("int4-channel-lsq"),
    "random": Scheme("int4-g16-sr"),
    "asym": Scheme("int4-asym-g16", input="int8-token"),
    "moving": Scheme("int4-channel-ema"),
    "two levels": Scheme("nvfp4"),
    "codes": Scheme("int4-channel", input="int8-token", product="codes"),
    "adapter": Scheme("int4-g16-learned", adapter=LoRA(rank=2)),
}


def model(scheme: Scheme, *, kept: bool) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    convert(made, {"*": copy.deepcopy(scheme)})
    for layer in made[0], made[2]:
        layer.quantizer("weight").kept = KeptWeight() if kept else None
        if "adapter" in dict(layer.named_children()):
            layer.adapter.b.data.normal_(std=0.1)
    return made.train()


def micro_batch(net: nn.Module, seed: int, *, autocast: bool = False, again: bool = False) -> list[torch.Tensor]:
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = checkpoint(net, x, use_reentrant=False) if again else net(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs) > 2
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("how", [{}, {"autocast": True}, {"again": True}], ids=["plain", "autocast", "checkpointed"])
@pytest.mark.parametrize("name", SCHEMES)
def test_every_bit_is_that_of_a_weight_made_anew(name, how) -> None:
    fast, slow = model(SCHEMES[name], kept=True), model(SCHEMES[name], kept=False)
    optimizers = [torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.05) for net in (fast, slow)]
    for step in range(3):
        for micro in range(3):
            assert_same(*(micro_batch(net, 10 * step + micro, **how) for net in (fast, slow)))
            for net in (fast, slow):
                for module in net.modules():
                    if hasattr(module, "advance"):
                        module.advance()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(fast.eval()(torch.ones(1, 32)), slow.eval()(torch.ones(1, 32)))


def test_ramps_phases_and_loaded_weights_are_seen() -> None:
    fast, slow = model(SCHEMES["group"], kept=True), model(SCHEMES["group"], kept=False)

    def ramp(net: nn.Module, strength: float) -> None:
        net[0].quantizer("weight").set_strength(strength)

    changes = [
        lambda net: ramp(net, 0.25),
        lambda net: ramp(net, 0.75),
        lambda net: ramp(net, 1.0),
        lambda net: setattr(net[2].quantizer("weight"), "enabled", False),
        lambda net: setattr(net[2].quantizer("weight"), "enabled", True),
        lambda net: net.load_state_dict(model(SCHEMES["group"], kept=False).double().float().state_dict()),
        lambda net: net.double(),
        lambda net: net.float(),
    ]
    for change in changes:
        for net in (fast, slow):
            change(net)
            net.zero_grad()
        if next(fast.parameters()).dtype == torch.float32:
            assert_same(micro_batch(fast, 1), micro_batch(slow, 1))


def roundings(net: nn.Module, passes: int) -> int:
    """How often weights are rounded in so many forward and backward passes."""
    count = 0

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal count
            count += func is torch.ops.aten.round_.default
            return func(*args, **(kwargs or {}))

    with Counting():
        for seed in range(passes):
            micro_batch(net, seed)
    return count


def test_it_is_made_once() -> None:
    assert roundings(model(SCHEMES["group"], kept=False), 3) == 2 * 2 * 3  # two layers, forward and backward
    assert roundings(model(SCHEMES["group"], kept=True), 3) == 2


def test_layers_that_share_a_weight_share_what_is_kept() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    net[1].weight = net[0].weight
    convert(net, {"*": "int4-g16"}, tied="share")
    slow = roundings(net, 1)
    net[0].quantizer("weight").kept = KeptWeight()
    assert roundings(net, 1) == 1 < slow


def test_clear_frees_it_and_copies_do_not_carry_it() -> None:
    net = model(SCHEMES["group"], kept=True)
    micro_batch(net, 0)
    kept = net[0].quantizer("weight").kept
    assert sum(t.nbytes for t in kept._made.values() if isinstance(t, torch.Tensor)) == net[0].weight.nbytes
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert isinstance(other[0].quantizer("weight").kept, KeptWeight)
        assert not other[0].quantizer("weight").kept._made
    kept.clear()
    assert not kept._made
