"""The one autograd function: not-a-numbers, recomputation, what it refuses, and what it costs when bypassed."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlightning.layers.convert import convert

SCHEMES = [
    {"weight": "int4-g8"},
    {"weight": "int4-lsq", "input": "int8-token"},
    {"weight": "int4-sr", "input": "int8-token-sr"},
    {"weight": "nvfp4", "input": "int8-tensor-lsq"},
    {"weight": "int8-ema", "input": "int8-tensor-ema"},
    {"weight": "int4", "output": "int8-tensor-ema"},
]


def network(scheme):
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    convert(model, {"*": scheme})
    for layer in (model[0], model[2]):
        for prefix in ("input", "output"):
            if (quantizer := layer.quantizer(prefix)) is not None:
                quantizer.initialize(torch.randn(4, 16))
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "input", ["int8-token", "int8-tensor-ema", "int8-tensor-lsq", "nf4-tensor-ema", "fp8e4m3-tensor-ema", "mxfp4"]
)
def test_a_nan_in_the_input_is_nan_in_the_output(input, training):
    layer = nn.Sequential(nn.Linear(32, 16))
    convert(layer, {"*": {"weight": "int4", "input": input}})
    layer[0].quantizer("input").initialize(torch.randn(4, 32))
    layer[0].quantizer("input").scale.moving = False
    layer.train(training)
    x = torch.randn(4, 32)
    x[1, 2] = float("nan")
    y = layer(x)
    y.nansum().backward()
    assert y.isnan().any(dim=1).tolist() == [False, True, False, False]


def test_a_nan_in_the_weight_is_nan_in_the_output():
    model = network({"weight": "int4", "input": "int8-token"})
    with torch.no_grad():
        model[0].weight[3, 5] = float("nan")
    assert model[0](torch.randn(4, 16)).isnan().all(dim=0).tolist() == [row == 3 for row in range(16)]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_activation_checkpointing_changes_no_gradient(scheme, reentrant):
    x = torch.randn(5, 16)
    gradients, states = [], []
    for recompute in (False, True):
        torch.manual_seed(1)
        model = network(scheme)
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            y = checkpoint(model, leaf, use_reentrant=reentrant) if recompute else model(leaf)
            y.square().sum().backward()
        gradients.append([leaf.grad, *(p.grad for p in model.parameters())])
        states.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])  # observed once, not twice


@pytest.mark.parametrize("scheme", SCHEMES[:4], ids=str)
def test_the_same_call_gives_the_same_values(scheme):
    model, x = network(scheme), torch.randn(5, 16)
    assert torch.equal(model(x), model(x))
    with torch.no_grad():
        assert torch.equal(model(x), model(x.clone().requires_grad_()))
    with torch.inference_mode():
        inferred = model(x)
    assert torch.equal(model(x), inferred.clone())


def test_backward_quantizes_the_weight_with_the_noise_of_forward():
    """grad_input = grad @ Q(w): an identity as input shows the Q(w) that forward used."""
    layer = nn.Sequential(nn.Linear(16, 16, bias=False))
    convert(layer, "int3-sr")
    x = torch.eye(16, requires_grad=True)
    y = layer(x)
    y.backward(torch.eye(16))
    assert torch.equal(x.grad, y.detach().t())
    layer[0].quantizer("weight").rounding.advance()
    assert not torch.equal(layer(x), y)


def test_a_second_derivative_is_an_error_and_not_a_wrong_number():
    model = network({"weight": "int4"})
    x = torch.randn(4, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_a_weight_changed_between_forward_and_backward_is_an_error():
    model = network({"weight": "int4-g8", "input": "int8-token"})
    y = model(torch.randn(4, 16))
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("weight", ["int4-lsq", "int4-g8", "nvfp4"])
def test_bypassed_it_saves_what_the_plain_layer_saves(weight):
    def saved(layer):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            layer(torch.randn(4, 16, requires_grad=True))
        parameters = {p.data_ptr() for p in layer.parameters()}
        return sum(t.untyped_storage().nbytes() for t in kept if t.data_ptr() not in parameters)

    plain = nn.Linear(16, 16)
    model = network({"weight": weight, "input": "int8-token"})
    for _, quantizer in model[0].quantizers():
        quantizer.enabled = False
    assert saved(model[0]) == saved(plain) == 4 * 16 * 4


def test_meta_tensors_pass_through_it():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)).to("meta")
    convert(model, {"*": {"weight": "int4-g8", "input": "int8-token"}})
    x = torch.randn(3, 16, device="meta", requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert y.shape == (3, 4)
    assert x.grad.shape == x.shape
