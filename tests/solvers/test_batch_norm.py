"""Batch norms: folded they are the identity, measured anew they move statistics back, folded again no code changes."""

import pytest
import torch
from torch import nn

from qlightning.capture import sites_of
from qlightning.layers.convert import convert
from qlightning.solvers import RTN, calibrate
from qlightning.solvers.batch_norm import batch_norms, find_normalized, fold_norm, reestimate, refold_norm


class Residual(nn.Module):
    """A convolution that a norm alone sees, one that a shortcut sees too, and a linear layer before a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.two, self.shared = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.last, self.flat = nn.Linear(8 * 16, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        x = torch.relu(self.norm(self.one(x)))
        y = self.two(x)
        return self.flat(self.last(torch.relu(self.shared(y) + y).flatten(1)))


def net(dtype=torch.float32):
    torch.manual_seed(0)
    model = Residual()
    for norm in batch_norms(model):
        nn.init.normal_(norm.weight)  # of either sign
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return model.to(dtype).eval()


def data(count=4, dtype=torch.float32):
    return list(torch.randn(count, 16, 3, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype))


def pairs_of(model):
    x = data(1, next(model.parameters()).dtype)[0]
    return find_normalized(model, lambda: model(x))


@torch.no_grad()
def test_folded_the_norm_is_the_identity_and_the_function_stays() -> None:
    """The card's check, before anything is measured anew."""
    model, (x,) = net(torch.float64), data(1, torch.float64)
    before, pairs = model(x), pairs_of(model)
    assert [pair.name for pair in pairs] == ["one", "last"]  # the shortcut sees what "two" returns
    gammas = [pair.norm.weight.clone() for pair in pairs]
    betas = [pair.norm.bias.clone() for pair in pairs]
    for pair, gamma, beta in zip(pairs, gammas, betas, strict=True):
        fold_norm(pair)
        y = torch.randn(5, len(gamma), *([4, 4] if pair.name == "one" else []), dtype=torch.float64)
        torch.testing.assert_close(pair.norm(y), y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(pair.norm.running_var, gamma**2)
        assert torch.equal(pair.norm.running_mean, beta)
        assert torch.equal(pair.norm.bias, beta)
        torch.testing.assert_close(pair.norm.weight, (gamma**2 + pair.norm.eps).sqrt())
    assert model.one.bias is not None
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)


SPECS = ["int3-channel-asym", "int3-channel", "int3-channel-asym-learned", "int4-g4"]


@pytest.mark.parametrize("spec", SPECS)
def test_codes_are_equal_before_and_after_the_second_fold(spec) -> None:
    """The card's check; the function is that of the norm with its new statistics."""
    model = net()
    pairs = pairs_of(model)
    for pair in pairs:
        fold_norm(pair)
    rules = {"*": spec, "one": spec.replace("g4", "g9"), "two": None}
    convert(model, rules, min_coverage=0.0)
    calibrate(model, data(), RTN(), forward=lambda module, batch: module(batch), blocks=["one", "last"])
    pairs, codes = pairs_of(model), {s.name: s.quantizer.quantize(s.weight) for s in sites_of(model)}
    assert [pair.name for pair in pairs] == ["one", "last"]
    moved, (x,) = model(x_ := data(1)[0]).detach(), data(1)
    assert reestimate(model, data()) == 3
    repaired = model(x_).detach()
    assert not torch.allclose(repaired, moved, rtol=1e-2)
    for pair in pairs:
        weight = pair.norm.weight.clone()
        refold_norm(pair)
        assert torch.equal(pair.norm.weight, weight)
        y = torch.randn(5, len(weight), *([4, 4] if pair.name == "one" else []))
        torch.testing.assert_close(pair.norm(y), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x).detach(), repaired, rtol=1e-4, atol=1e-4)
    for site in sites_of(model):
        now, before = site.quantizer.quantize(site.weight), codes[site.name]
        assert torch.equal(now.codes, before.codes)
        assert not torch.allclose(now.scale, before.scale, rtol=1e-3)
        if before.zero_point is not None:
            assert torch.equal(now.zero_point, before.zero_point)


def test_measuring_gives_channels_back_the_mean_and_spread_of_training() -> None:
    """Of a quantized layer's output before a folded norm: mean beta and spread |gamma| behind it."""
    model, (x,) = net(), data(1)
    (pair, *_) = pairs_of(model)
    beta, gamma = pair.norm.bias.detach().clone(), pair.norm.weight.detach().abs().clone()
    fold_norm(pair)
    convert(model, {"one": "int2-channel"}, min_coverage=0.0)
    y = model.one(x).detach()
    assert float((y.mean((0, 2, 3)) - beta).abs().max()) > 0.05
    reestimate(model, [x], forward=lambda module, batch: module(batch))
    behind = pair.norm(y).detach()
    torch.testing.assert_close(behind.mean((0, 2, 3)), beta, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(behind.std((0, 2, 3)), gamma, rtol=1e-2, atol=1e-3)


def test_what_is_measured_and_what_is_left_alone() -> None:
    """The mean over the batches of each batch's statistics, as torch's own norm counts with momentum None."""
    model, batches = net(), data(3)
    model.train()
    model.norm.eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    reestimate(model, batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.norm.training
    assert model.norm.momentum == 0.1
    y = [model.one(x).detach() for x in batches]
    torch.testing.assert_close(model.norm.running_mean, torch.stack([t.mean((0, 2, 3)) for t in y]).mean(0))
    torch.testing.assert_close(model.norm.running_var, torch.stack([t.var((0, 2, 3)) for t in y]).mean(0))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("running" not in name and "tracked" not in name), name


def test_what_cannot_be_done() -> None:
    with pytest.raises(ValueError, match="Linear has no batch norms"):
        reestimate(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="no data"):
        reestimate(net(), [])
    model = net()
    (pair, *_) = pairs_of(model)
    with pytest.raises(ValueError, match=r"fold_norm\(pair\)"):
        refold_norm(pair)
    fold_norm(pair)
    convert(model, {"one": "int4-tensor"}, min_coverage=0.0)
    reestimate(model, data())
    with pytest.raises(ValueError, match="int4-channel-asym"):
        refold_norm(pair)
