"""AdaQuant: held-out layer errors never rise, steps are the formula's, streams and ReLUs are as the paper has them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlightning.capture import sites_of
from qlightning.layers.convert import convert, quantizers_of
from qlightning.layers.scheme import Scheme
from qlightning.numerics import EMA, Int, Learned, Quantizer
from qlightning.solvers import RTN, AdaQuant, calibrate
from qlightning.solvers.adaquant import only_positive
from qlightning.solvers.fixed import fix_scales
from qlightning.solvers.solver import BlockTask


def run(model, batch):
    return model["layers"][0](batch)


def net(spec="int3-asym"):
    """One block: a convolution and a depthwise one, each before a ReLU, and a linear layer after the last."""
    torch.manual_seed(0)
    block = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )
    convert(block, spec)
    return nn.ModuleDict({"layers": nn.ModuleList([block])})


def pictures(count, seed=0):
    return list(torch.randn(count, 8, 3, 6, 6, generator=torch.Generator().manual_seed(seed)))


LAYERS = (0, 2, 5)


def layer_errors(model, plain, batch):
    """By layer, the squared distance from the float layer on the float model's activations, after a ReLU."""
    block, errors = plain["layers"][0], []
    with torch.no_grad():
        x = batch
        for i, layer in enumerate(block):
            y = layer(x)
            if i in LAYERS:
                found = model["layers"][0][i](x)
                errors.append(float(F.mse_loss(*(F.relu(t) if i < 5 else t for t in (found, y)))))
            x = y
    return errors


def in_float():
    plain = net()
    for _, quantizer in quantizers_of(plain):
        quantizer.enabled = False
    return plain


def test_of_every_layer_the_held_out_error_falls() -> None:
    """The card's check: after <= before on rows that nothing was learned from, in the parallel mode."""
    data, nearest, model, plain = pictures(5), net(), net(), in_float()
    calibrate(nearest, data, RTN(), forward=run)
    solver = AdaQuant(steps=120, weight_lr=3e-4, stream="fp", held_out=0.2)
    report = calibrate(model, data, solver, forward=run)
    before, after = (layer_errors(m, plain, data[4]) for m in (nearest, model))
    assert all(mine < 0.98 * theirs for mine, theirs in zip(after, before, strict=True))
    for row, mine, theirs in zip(report.sites, after, before, strict=True):
        assert float(row.note.split()[0]) == pytest.approx(mine / theirs, rel=2e-3)
    for site in sites_of(model):
        stored = site.quantizer.dequantize(site.quantizer.quantize(site.weight), torch.float32)
        assert torch.equal(site.quantizer(site.weight).detach(), stored)
        assert torch.equal(site.weight, stored)


def test_a_learning_rate_that_is_too_large_leaves_rounding_to_nearest() -> None:
    data, nearest, model = pictures(3), net(), net()
    calibrate(nearest, data, RTN(), forward=run)
    report = calibrate(model, data, AdaQuant(steps=6, weight_lr=9.0, patience=1), forward=run)
    assert all(row.note.startswith("1 of the held-out error") and row.changed == 0 for row in report.sites)
    for one, other in zip(model.parameters(), nearest.parameters(), strict=True):
        assert torch.equal(one, other)


def task_of(block, streams):
    fix_scales(block)
    for _, quantizer in quantizers_of(block):
        quantizer.enabled = False
    block.requires_grad_(False)
    calls = {name: [((x,), {}) for x in xs] for name, xs in streams.items()}
    return BlockTask(block, [[site] for site in sites_of(block)], calls, {})


def streams(g):
    return {name: [torch.randn(16, 8, generator=g)] for name in ("q", "fp")}


@pytest.mark.parametrize("stream", ["q", "fp"])
def test_the_steps_are_those_of_the_formula(stream) -> None:
    """Adam on the formula written out, with its own rate for weight, bias and both ends of the ranges."""
    torch.manual_seed(0)
    given, layer = streams(torch.Generator().manual_seed(0)), nn.Linear(8, 4)
    block = nn.Sequential(layer)
    convert(block, "int3-asym")
    task = task_of(block, given)
    grid = layer.weight_quantizer.grid(layer.weight)
    x, y = given[stream][0], F.linear(given["fp"][0], layer.weight, layer.bias).detach()
    w, b = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    step = grid.scale.view(4, 1).clone().requires_grad_()
    lower = ((-4 - grid.zero_point) * grid.scale).view(4, 1).clone().requires_grad_()

    def rounded(t):
        return t + (t.round() - t).detach()

    def quantized():
        exact = rounded(-4 - lower / step)
        zero = exact + (exact.clamp(-4, 3) - exact).detach()
        return step * ((rounded(w / step) + zero).clamp(-4, 3) - zero)

    optimizer = torch.optim.Adam(
        [
            {"params": [w], "lr": 1e-2},
            {"params": [b], "lr": 3e-2},
            {"params": [step], "lr": 2e-2 / 7},
            {"params": [lower], "lr": 2e-2},
        ]
    )
    for _ in range(4):
        optimizer.zero_grad()
        F.mse_loss(F.linear(x, quantized(), b), y).backward()
        optimizer.step()
    solver = AdaQuant(steps=4, weight_lr=1e-2, bias_lr=3e-2, range_lr=2e-2, stream=stream, held_out=0.0)
    with torch.enable_grad():
        solver.solve(task, generator=torch.Generator())
    torch.testing.assert_close(layer.weight, quantized().detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.bias, b.detach(), rtol=1e-4, atol=1e-6)


def test_layers_of_a_block_see_what_was_quantized_before_them() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    convert(block, "int2-asym")
    found = {}
    for stream in ("q", "fp"):
        task = task_of(block, {"q": (xs := [torch.ones(2, 8)]), "fp": xs})
        seen = []
        hook = block[1].register_forward_pre_hook(
            lambda m, args, seen=seen: seen.append((torch.is_grad_enabled(), args[0]))
        )
        before = [p.clone() for p in block.parameters()]
        expected = block[0](xs[0])
        with torch.enable_grad():
            AdaQuant(steps=1, stream=stream, held_out=0.0).solve(task, generator=torch.Generator())
        found[stream] = next(x for grad, x in seen if grad)
        quantized = F.linear(xs[0], block[0].weight, block[0].bias)
        assert torch.equal(found[stream], expected if stream == "fp" else quantized)
        hook.remove()
        for p, value in zip(block.parameters(), before, strict=True):
            p.data.copy_(value)


def test_where_a_relu_follows() -> None:
    block = in_float()["layers"][0]
    call = [((pictures(1)[0],), {})]
    assert [only_positive(block, str(i), call) for i in LAYERS] == [True, True, False]
    assert not block[0]._forward_hooks
    model = net()
    report = calibrate(model, pictures(2), AdaQuant(steps=0), forward=run)
    assert ["positive" in row.note for row in report.sites] == [True, True, False]


@pytest.mark.parametrize("scale", [Learned(), EMA()], ids=["learned", "ema"])
def test_ranges_of_inputs_are_found_and_learned(scale) -> None:
    def made():
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        convert(block, Scheme("int4-asym", input=Quantizer(Int(4, symmetric=False), scale=scale)))
        return nn.ModuleDict({"layers": nn.ModuleList([block])})

    data = [torch.randn(32, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    start, model = made(), made()
    calibrate(start, data, AdaQuant(steps=0), forward=run)
    calibrate(model, data, AdaQuant(steps=40, input_lr=3e-2, held_out=0.0), forward=run)
    for before, after in zip(start["layers"][0], model["layers"][0], strict=True):
        if isinstance(before, nn.Linear):
            one, other = before.input_quantizer, after.input_quantizer
            assert one.ready
            assert other.ready
            if before is start["layers"][0][0]:  # what later layers see depends on what was learned before
                assert torch.equal(one.scale.value, other.scale.value) == isinstance(scale, EMA)


def test_resume(kind) -> None:
    make, batches = kind
    whole, states = make("int3-asym"), []
    solver = AdaQuant(steps=2, weight_lr=1e-3)
    report = calibrate(whole, batches(), solver, on_block=states.append)
    assert all(site.quantizer.enabled for site in sites_of(whole))
    assert len(report.sites) == len(sites_of(whole))
    again = make("int3-asym")
    calibrate(again, batches(), solver, state=states[0])
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("arguments", [{"steps": -1}, {"weight_lr": -1.0}, {"stream": "both"}, {"patience": 0}])
def test_wrong_arguments(arguments) -> None:
    with pytest.raises(ValueError, match=r"for example AdaQuant\("):
        AdaQuant(**arguments)
