"""Patterns name the submodules they say; taps see what those give, and only while they are entered."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlightning.layers.convert import convert
from qlightning.losses.taps import Site, Taps, partner, sites


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x):
        return x + self.act(self.lin(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Module()
        self.body.layers = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for layer in self.body.layers:
            x = layer(x)
        return {"hidden": x, "logits": self.head(x), "rest": (x, x)}


def names(module, pattern):
    return [site.name for site in sites(module, pattern)]


def test_patterns():
    model = Model()
    assert names(model, "forward") == ["forward"]
    assert names(model, "body.layers.1") == names(model, "layers.1") == ["body.layers.1"]
    assert names(model, "layers.*") == ["body.layers.0", "body.layers.1", "body.layers.2"]
    assert names(model, "layers.0.**") == ["body.layers.0.lin", "body.layers.0.act"]
    assert names(model, "lin") == names(model, "layers.*.lin") == [f"body.layers.{i}.lin" for i in range(3)]
    assert names(model, "type:Linear") == [*names(model, "lin"), "head"]
    assert sites(model, "layers.*.l*")[2].stars == ("2", "in")
    assert sites(model, "head:0")[0].key == "0"
    assert sites(model, "type:Linear:0")[0].key == "0"
    convert(model, "int8")
    assert names(model, "type:Linear") == [*names(model, "lin"), "head"]


def test_partners():
    model = Model()
    assert partner(model, "body.layers.*.lin", ("2",)).name == "body.layers.2.lin"
    assert partner(model, "layers.*", ("1",)).name == "body.layers.1"
    assert partner(model, "head", ("1",)).name == "head"
    assert partner(model, "forward:hidden", ()) == Site("forward", model, "hidden", ())
    with pytest.raises(ValueError, match=r"has 1 stars, the pattern it belongs to 2"):
        partner(model, "layers.*", ("1", "2"))
    with pytest.raises(ValueError, match=r"'lin' names several submodules, body.layers.0.lin"):
        partner(model, "lin", ())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layers.7", r"'layers.7' names no submodule of Model; there are for example body.layers"),
        ("heed", r"for example head"),
        ("type:Linnear", r"for example type:Linear"),
    ],
)
def test_names_that_match_nothing(pattern, message):
    with pytest.raises(ValueError, match=message):
        sites(Model(), pattern)


def tap(model, *patterns):
    found = [site for pattern in patterns for site in sites(model, pattern)]
    return Taps(found), found


def test_outputs():
    model, x = Model(), torch.randn(2, 4)
    taps, found = tap(model, "forward", "forward:hidden", "head", "layers.2")
    with taps:
        out = model(x)
    kept = [taps.outputs(site, trained=True) for site in found]
    for (tensor,), wanted in zip(kept, (out["logits"], out["hidden"], out["logits"], out["hidden"]), strict=True):
        assert tensor is wanted
    model(x)
    assert len(taps.outputs(found[0])) == 1  # the hooks are gone
    assert not any(module._forward_hooks for module in model.modules())
    with taps:
        model(x), model(x)
    assert len(taps.outputs(found[0])) == 2


class Gives(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self):
        return self.output


def test_kinds_of_output():
    one, two = torch.ones(2), torch.zeros(2)
    for output, pattern, wanted in [
        (one, "forward", one),
        ((one, two), "forward", one),
        ((one, two), "forward:1", two),
        (OrderedDict(loss=two, logits=one), "forward", one),
        ({"a": two}, "forward:a", two),
    ]:
        model = Gives(output)
        taps, (site,) = tap(model, pattern)
        with taps:
            model()
        assert taps.outputs(site)[0] is wanted
    for output, pattern in [({"a": one}, "forward"), ({"a": one}, "forward:b"), ((torch.tensor(3), one), "forward")]:
        model = Gives(output)
        with tap(model, pattern)[0], pytest.raises(ValueError, match=r"write for example 'forward:(a|0)'"):
            model()


def test_what_cannot_be_compared():
    model = Model()
    taps, found = tap(model, "lin", "head")
    for act in [module for module in model.modules() if isinstance(module, nn.ReLU)]:
        act.inplace = True
    with taps:
        model(torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"body.layers.0.lin gave was overwritten by an in-place.*inplace=False"):
        taps.outputs(found[0])
    with taps:
        pass
    with pytest.raises(ValueError, match=r"head was not called"):
        taps.outputs(found[-1])
    with taps, torch.no_grad():
        model(torch.randn(2, 4))
    taps.outputs(found[-1])
    with pytest.raises(ValueError, match=r"no gradient flows back from the output of head"):
        taps.outputs(found[-1], trained=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    """Recomputed calls are not seen; the gradient of a loss inside a segment is that without checkpointing."""
    block, x = Block(), torch.randn(3, 4, requires_grad=True)

    def run(call):
        taps, (site,) = tap(block, "lin")
        with taps:
            y = call(x)
        (inner,) = taps.outputs(site, trained=True)
        params = list(block.parameters())
        return torch.autograd.grad(y.sum() + inner.square().sum(), params)

    if reentrant:
        with pytest.raises(ValueError, match=r"use_reentrant': False"):
            run(lambda x: checkpoint(block, x, use_reentrant=True))
        return
    plain = run(block)
    again = run(lambda x: checkpoint(block, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
