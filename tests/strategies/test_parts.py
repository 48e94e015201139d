"""Layers with parts beside quantizers, and quantizers of other kinds: two processes train them as one does."""

import torch
import torch.distributed as dist

import qlightning
from qlightning.adapters.lora import LoRA
from qlightning.methods.fairy2i import PhaseSum
from qlightning.numerics import Int, PerChannel, Quantizer
from qlightning.numerics.compensate import ClampCompensate
from qlightning.solvers.incoherence import Incoherence

W8A8 = {"weight": "int8-channel", "input": "int8-token"}
SCHEMES = {  # how many of the two weights travel as codes
    "inside": ({"weight": "int4-channel-lsq", "adapter": LoRA(rank=2)}, 0),
    "base of one byte": ({"weight": "int4-channel-learned", "adapter": LoRA(rank=2, base="fixed")}, 0),
    "base of codes": ({"weight": "int4-channel-learned", "adapter": LoRA(rank=2, base="codes", unit="step")}, 2),
    "base of 6-bit codes": ({"weight": "int5-channel-learned", "adapter": LoRA(rank=2, base="codes")}, 2),
    "products of codes": ({**W8A8, "product": "codes"}, 2),
    "products of static codes": ({"weight": "int8-tensor-lsq", "input": "int8-token", "product": "codes"}, 2),
    "products of floats": ({"weight": "fp8e4m3-channel", "input": "fp8e4m3-token", "product": "codes"}, 2),
    "backward": ({**W8A8, "backward": {"grad_dgrad": "int8-token", "grad_wgrad": "int8-channel"}}, 2),
    "weight_dgrad": ({**W8A8, "backward": {"grad_dgrad": "int8-token", "weight_dgrad": "int8-channel"}}, 0),
    "clamped": ({"weight": ClampCompensate("int4-channel", alpha=0.95)}, 0),
    "phases": ({"weight": PhaseSum()}, 0),
    "basis": ({"weight": Quantizer(Int(4), PerChannel(), transform=Incoherence(seed=0))}, 0),
}


def built(kit, case, seed=1):
    scheme, _ = SCHEMES[case]
    torch.manual_seed(seed)
    net = kit.Net()
    qlightning.convert(net, {"*": qlightning.Scheme(**scheme)}, min_coverage=0)
    return net


def run(kit, case, *, codes):
    net = built(kit, case)
    plan, gathers = kit.sharded(net, codes=codes)
    assert len(gathers) == codes * SCHEMES[case][1], plan.table()
    losses = kit.train(net, 2, dist.get_rank(), gathers, steps=3)
    assert all(gather.coded for gather in gathers)
    dist.all_reduce(losses)
    return losses / 2, kit.whole(net)


def test_as_one_process(ranks, kit):
    """Bits of a gather in full, and what a single process finds."""

    def check():
        return {case: [run(kit, case, codes=codes) for codes in (True, False)] for case in SCHEMES}

    for found in ranks(2, check, seconds=300):
        for case, ((losses, trained), (expected, reference)) in found.items():
            one = built(kit, case)
            alone = kit.train(one, steps=3)
            assert alone[-1] != alone[0], case
            assert torch.allclose(losses, alone, rtol=1e-3 if "backward" in SCHEMES[case][0] else 1e-5), case
            assert torch.equal(losses, expected) or "static" in case, case
            for name, tensor in reference.items():
                same = torch.allclose if "scale" in name or "static" in case else torch.equal
                assert same(trained[name], tensor), (case, name)


def test_bytes_of_a_base_of_codes(ranks, kit):
    """Four bits each on the wire, and the adapter in full."""

    def check():
        net = built(kit, "base of codes")
        _, gathers = kit.sharded(net)
        return [sum(tensor.nbytes for tensor in gather.sent()) / gather.local.numel() for gather in gathers]

    assert ranks(2, check) == [[0.5, 0.5]] * 2
