"""Every kind of layer whose weight can travel as codes: the same bits as under FSDP2's own gather."""

import torch
import torch.distributed as dist
from torch import nn

import qlightning
from qlightning.adapters.lora import LoRA
from qlightning.strategies.shard_gradients import finished_on_shards


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)

    def forward(self, x):
        return self.head(self.embed(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0].clone()  # FSDP2 warns of views


class Images(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.ConvTranspose2d(5, 2, 3))


class Experts(nn.Module):
    """Each token goes to one expert."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(3, 8, 8)), nn.Parameter(torch.randn(3, 8, 4))

    def forward(self, x):
        routed = torch.arange(x.shape[0]) % 3
        gate, up = torch.einsum("ti,toi->to", x, self.gate_up_proj[routed]).chunk(2, -1)
        return torch.einsum("ti,toi->to", gate.tanh() * up, self.down_proj[routed]).clone()  # FSDP2 warns of views


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(8, 8), Experts()

    def forward(self, x):
        return self.experts(self.router(x))


def tied():
    net = Tokens()
    net.head.weight = net.embed.weight
    return net


def linear():
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


IDS, ROWS, PICTURE = torch.arange(22).view(2, 11) % 11, torch.linspace(-1, 1, 48).view(2, 3, 8), torch.ones(2, 2, 5, 5)
CASES = {  # builder, its input, rules, how many of its weights travel as codes
    "embedding": (Tokens, IDS, {"*": "int8-channel", "embed": "int4-g4"}, 2),
    "embedding-static": (Tokens, IDS, {"*": "int8-channel", "embed": "int8-channel-lsq"}, 2),
    "tied": (tied, IDS, {"*": "int8-channel", "embed": "int8-channel"}, 1),
    "attention": (Attention, ROWS, {"*": {"weight": "int8-channel", "input": "int8-token"}}, 2),
    "conv": (Images, PICTURE, {"*": "int8-channel"}, 1),  # a transposed one has its output channels elsewhere
    "experts": (Mixture, ROWS[0], {"*": "int4-g4", "experts": "int8-channel"}, 3),
    "experts-ternary": (Mixture, ROWS[0], {"*": "ternary"}, 3),
    "lora": (linear, ROWS[0], {"*": qlightning.Scheme("int8-channel", adapter=LoRA(rank=2))}, 0),
    "codes": (linear, ROWS[0], {"*": qlightning.Scheme("int4-channel-lsq", adapter=LoRA(rank=2, base="codes"))}, 2),
    "skipped": (linear, ROWS[0], {"*": {"weight": "int4-g2", "input": "int8-token"}, "0": None}, 1),
    "stochastic": (linear, ROWS[0], {"*": "int4-g2-sr", "2": "ternary"}, 1),
}


def gradients(kit, case, dtype, *, codes):
    build, x, rules, count = CASES[case]
    torch.manual_seed(2)
    net = build()
    qlightning.convert(net, rules, tied="share", min_coverage=0)
    net.to(dtype)
    _, gathers = kit.sharded(net, codes=codes)
    x = x.to(dtype) if x.is_floating_point() else x
    y = net(x + dist.get_rank() if x.is_floating_point() else x)
    with finished_on_shards(gathers):
        (y.float() ** 2).sum().backward()
    assert sum(gather.coded for gather in gathers) == count * codes
    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    found = {name: p.grad.full_tensor() for name, p in net.named_parameters() if p.grad is not None}
    return [y.detach(), found]


def test_layers(ranks, kit):
    def check():
        return {
            (case, dtype): [gradients(kit, case, dtype, codes=codes) for codes in (True, False)]
            for case in CASES
            for dtype in (torch.float32, torch.bfloat16)
        }

    for found in ranks(2, check):
        for case, ((y, ours), (expected, reference)) in found.items():
            assert torch.equal(y, expected), case
            assert ours.keys() == reference.keys(), case
            for name, gradient in reference.items():
                same = torch.allclose if name.endswith("scale.value") else torch.equal
                assert same(ours[name], gradient), (case, name)
