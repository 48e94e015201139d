"""LET: folding leaves the float function in float64, the transformations are the paper's, learning helps or is left."""

import pytest
import torch
from torch import nn

from qlightning.capture import find_blocks, sites_of
from qlightning.layers.convert import convert, quantizers_of
from qlightning.layers.scheme import Scheme
from qlightning.solvers import LET, RTN, calibrate
from qlightning.solvers.folding import find_producer, fold, takes_shift
from qlightning.solvers.let import acting, channel_ranges, first_scale


def float64_tasks(small):
    """The first layer of a Llama, without biases, and of a ViT, with them, in float64."""
    vit = small.vit().double()
    for p in vit.parameters():
        nn.init.normal_(p, std=0.3)
    block = next(iter(block for name, block in find_blocks(vit).items() if "layer" in name))
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"llama": small.first_layer(small.llama().double()), "vit": small.task(block, x)}


def test_folding_leaves_the_float_output_in_float64(small) -> None:
    """The card's check: to 1e-9, with scales and shifts of a wide range."""
    for name, task in float64_tasks(small).items():
        generator, (call,) = torch.Generator().manual_seed(0), task.inputs["fp"]
        before, folded, shifted = task.run(call), [], []
        for group in task.groups:
            features = group[0].weight.shape[1]
            producer = find_producer(task, group, generator=generator)
            if producer is None:
                continue
            s = torch.exp(2 * torch.randn(features, generator=generator, dtype=torch.float64))
            shift = None
            if takes_shift(task, group, producer, generator=generator):
                shift = 3 * torch.randn(features, generator=generator, dtype=torch.float64)
                shifted.append(producer.name)
            weight = group[0].weight.clone()
            fold(group, producer, s, shift)
            assert not torch.allclose(group[0].weight, weight, rtol=0.1)
            folded.append(producer.name)
            assert float((task.run(call) - before).abs().max()) < 1e-9 * float(before.abs().max())
        assert len(folded) == {"llama": 4, "vit": 3}[name]  # GELU takes no scale
        assert len(shifted) == {"llama": 0, "vit": 3}[name]


class Gated(nn.Module):
    """A product, which a scale passes and a shift does not, and a layer without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down, self.last = (nn.Linear(8, 8) for _ in range(4))
        self.bare = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.bare(self.last(self.down(self.up(x) * torch.sigmoid(self.gate(x)))))


def test_what_takes_a_scale_and_no_shift(small) -> None:
    torch.manual_seed(0)
    block = Gated()
    convert(block, "int4")
    task = small.task(block, torch.randn(6, 8))
    found = {}
    for group in task.groups:
        producer = find_producer(task, group, generator=torch.Generator())
        if producer is not None:
            shifts = takes_shift(task, group, producer, generator=torch.Generator())
            found[group[0].name] = (producer.name, shifts)
    assert found == {"down": ("up", False), "last": ("down", True), "bare": ("last", False)}


def test_the_first_scale() -> None:
    x, w = torch.tensor([1.0, 4.0, 16.0, 0.0]), torch.tensor([2.0, 1.0, 0.5, 3.0])
    by_hand = [1 / 2**0.25, 4**0.75, 16**0.75 / 0.5**0.25, 1.0]
    torch.testing.assert_close(first_scale(x, w, 0.75), torch.tensor(by_hand))
    adaptive = first_scale(x[:3], w[:3], (0.5, 0.7))  # x / w = 0.5, 4, 32
    a = [0.5, 0.5 + 0.2 * 3.5 / 31.5, 0.7]
    torch.testing.assert_close(adaptive, torch.stack([x[i] ** a[i] / w[i] ** (1 - a[i]) for i in range(3)]))


def two_layers(spec="int4"):
    """A norm with channels off their centre and of different sizes, and the layers that see it."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    with torch.no_grad():
        block[0].weight.copy_(torch.logspace(-1, 1, 16))
        block[0].bias.copy_(5 * torch.randn(16))
    convert(block, Scheme(spec, input="int4-token-asym"))
    return nn.ModuleDict({"layers": nn.ModuleList([block])}), [torch.randn(8, 16) for _ in range(3)]


def run(model, batch):
    return model["layers"][0](batch)


def in_float(model, x):
    with torch.no_grad():
        for _, quantizer in quantizers_of(model):
            quantizer.enabled = False
        y = run(model, x)
        for _, quantizer in quantizers_of(model):
            quantizer.enabled = True
        return y


def quantized_error(model, data, wanted):
    with torch.no_grad():
        return sum(float((run(model, x) - y).square().sum()) for x, y in zip(data, wanted, strict=True))


def test_the_first_transformation_is_the_formulas() -> None:
    model, data = two_layers()
    norm, layer = model["layers"][0][0], model["layers"][0][1]
    seen = norm(torch.cat(data)).detach()
    low, high, w = seen.amin(0), seen.amax(0), layer.weight.detach().clone()
    shift = (low + high) / 2
    s = ((high - low) / 2) ** 0.75 / w.abs().amax(0) ** 0.25
    expected = (norm.bias.detach() - shift) / s, norm.weight.detach() / s
    bias, weight = layer.bias.detach() + w @ shift, w * s
    report = calibrate(model, data, LET(steps=0), forward=run)
    for found, wanted in zip((norm.bias, norm.weight), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-4, atol=1e-5)
    rows = bias / layer.bias.detach()  # of which the next layer's scale took a share
    torch.testing.assert_close(layer.weight.detach() * rows[:, None], weight, rtol=1e-3, atol=1e-4)
    after = norm(torch.cat(data)).detach()
    torch.testing.assert_close(after.amin(0), -after.amax(0), rtol=1e-4, atol=1e-4)
    (first, second) = (row.note for row in report.sites)
    assert first.startswith("scaled and shifted into 0, as it began, 0.")
    assert second.startswith("scaled into 1")  # a ReLU takes no shift


def test_the_float_function_stays_and_the_quantized_one_comes_closer_with_every_step() -> None:
    model, data = two_layers()
    wanted = [in_float(model, x) for x in data]
    errors = {}
    for name, solver in (("nearest", RTN()), ("first", LET(steps=0)), ("learned", LET(steps=200))):
        model, _ = two_layers()
        report = calibrate(model, data, solver, forward=run)
        for x, y in zip(data, wanted, strict=True) if name != "nearest" else ():
            torch.testing.assert_close(in_float(model, x), y, rtol=1e-4, atol=1e-4)
        errors[name] = quantized_error(model, data, wanted)
        for site in sites_of(model):
            stored = site.quantizer.dequantize(site.quantizer.quantize(site.weight), torch.float32)
            assert torch.equal(site.quantizer(site.weight).detach(), stored)
    assert errors["first"] < 0.8 * errors["nearest"]
    assert errors["learned"] < 0.9 * errors["first"]
    assert ", learned, " in report.sites[0].note
    again, _ = two_layers()
    calibrate(again, data, LET(steps=200), forward=run)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_transformations_that_hurt_are_left_out() -> None:
    """A scale that takes all the range into the weights, whose rows have one step, where inputs are not quantized."""
    model, data = two_layers()
    for layer in model["layers"][0]:
        layer._modules.pop("input_quantizer", None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = calibrate(model, data, LET(alpha=1.0, steps=0), forward=run)
    assert "left out, 1 of the block's error without" in report.sites[0].note
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_llama(small) -> None:
    model = small.llama("int4-asym")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[3] *= 12
    wanted = unquantized(model, small)
    report = calibrate(model, small.tokens(), LET(alpha=(0.5, 0.7), steps=2))
    notes = {row.name.removeprefix("model.layers.1."): row.note for row in report.sites}
    assert notes["self_attn.q_proj"].startswith("scaled into input_layernorm")
    assert notes["self_attn.o_proj"].startswith("scaled into self_attn.v_proj")
    torch.testing.assert_close(unquantized(model, small), wanted, rtol=1e-3, atol=1e-3)


def unquantized(model, small):
    for site in sites_of(model):
        site.quantizer.enabled = False
    logits = small.logits(model)
    for site in sites_of(model):
        site.quantizer.enabled = True
    return logits


def test_what_quantizers_do_meanwhile(small) -> None:
    model, data = two_layers()
    task = small.task(model["layers"][0], data[0])
    with acting(task):
        assert all(quantizer.enabled for _, quantizer in quantizers_of(model))
    assert not any(quantizer.enabled for _, quantizer in quantizers_of(model))
    ranges = channel_ranges(task.groups, task)
    torch.testing.assert_close(ranges["1"].high, task.block[0](data[0]).amax(0))


def test_other_models(kind) -> None:
    make, batches = kind
    model = make("int4-lsq")
    report = calibrate(model, batches(), LET(steps=1))
    assert all(row.note for row in report.sites)
    assert all(site.quantizer.enabled for site in sites_of(model))


@pytest.mark.parametrize("arguments", [{"alpha": 1.5}, {"alpha": (0.7, 0.5)}, {"shift": "mean"}, {"eps": 0}])
def test_wrong_arguments(arguments) -> None:
    with pytest.raises(ValueError, match=r"LET\(alpha=0\.75"):
        LET(**arguments)
