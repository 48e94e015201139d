"""Versions of weights: each as the solver alone finds it, the model as it was, taken layer by layer."""

import copy

import pytest
import torch
from torch import nn

from qlightning.allocation import measure_sensitivity
from qlightning.capture import sites_of
from qlightning.layers.convert import convert
from qlightning.numerics import parse
from qlightning.solvers import AWQ, AdaQuant, calibrate
from qlightning.solvers.versions import solve_versions, take_version

CANDIDATES = [parse(f"int{bits}-channel-asym-learned") for bits in (2, 8)]
SOLVER = AdaQuant(steps=4, weight_lr=1e-2, held_out=0.0)


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    convert(model, "int8-channel-asym-learned")
    for site in sites_of(model):
        site.quantizer.initialize(site.weight)
    return model


def data():
    return list(torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0)))


def test_versions_are_the_solvers_and_the_model_is_left() -> None:
    model = net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    identities = {name: id(p) for name, p in model.named_parameters()}
    found = solve_versions(model, data(), SOLVER, CANDIDATES)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    for candidate, versions in zip(CANDIDATES, found, strict=True):
        alone = net()
        for site in sites_of(alone):
            if not site.quantizer.deploys_like(candidate):
                site.quantizer.become(candidate)
            site.quantizer.initialize(site.weight)
        calibrate(alone, data(), SOLVER)
        taken = copy.deepcopy(model)
        for site, mine in zip(sites_of(alone), sites_of(taken), strict=True):
            version = versions[id(model.get_submodule(site.name)), "weight"]
            assert torch.equal(version.parameters["weight"], site.weight)
            assert not torch.equal(version.parameters["weight"], before[f"{site.name}.weight"])
            if not mine.quantizer.deploys_like(candidate):
                mine.quantizer.become(candidate)
            take_version(mine.layer, "weight", version)
        x = data()[0]
        assert torch.equal(taken(x), alone(x))


def test_sensitivity_is_measured_on_versions() -> None:
    model, x = net(), data()[0]
    versions = solve_versions(model, data(), SOLVER, CANDIDATES)
    wanted = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))

    def loss(module, batch):
        return (module(batch) - wanted).square().mean().detach()

    options = measure_sensitivity(model, loss, [x], candidates=CANDIDATES, others="quantized", versions=versions)
    base = float(loss(model, x))
    for names, row in options.items():
        for candidate, option, found in zip(CANDIDATES, row, versions, strict=True):
            by_hand = copy.deepcopy(model)
            layer, version = by_hand.get_submodule(names[0]), found[id(model.get_submodule(names[0])), "weight"]
            if not layer.weight_quantizer.deploys_like(candidate):
                layer.weight_quantizer.become(candidate)
            take_version(layer, "weight", version)
            assert option.increase == pytest.approx(float(loss(by_hand, x)) - base, abs=1e-7)
    assert float(loss(model, x)) == base


def test_what_makes_no_versions() -> None:
    with pytest.raises(ValueError, match="int4-channel-asym-learned"):
        solve_versions(net(), data(), SOLVER, [parse("int4-channel")])
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))])})
    convert(model, "int8-channel-asym-learned")
    with torch.no_grad():
        model["layers"][0][0].weight[1] = 20.0
    for site in sites_of(model):
        site.quantizer.initialize(site.weight)
    with pytest.raises(ValueError, match=r"changes layers\.0\.0\."):
        solve_versions(model, data(), AWQ(grid=4, shrink=0), CANDIDATES, forward=lambda m, x: m["layers"][0](x))
