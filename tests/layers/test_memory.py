"""Bytes saved for backward, by saved-tensor hooks, beside the plain layer: law 6."""

import copy

import pytest
import torch
from torch import nn

from qlightning.layers.convert import convert

WEIGHT_ONLY = ["int4-g32", "int4-g128", "int4-lsq", "int4-g32-lsq", "nvfp4", "ternary", "int8-asym", "nf4", "int4-sr"]
INPUTS = ["int8-token", "int8-asym-token", "fp8e4m3-token", "int8-tensor", "mxfp8e4m3"]


def saved_bytes(layer, x, *, autocast=False):
    """Bytes of the storages that a forward pass keeps, other than the layer's own parameters."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    assert y.requires_grad
    for parameter in layer.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def ratio(plain, scheme, x, *, autocast=False):
    model = nn.Sequential(copy.deepcopy(plain))
    convert(model, {"*": scheme})
    return saved_bytes(model[0], x, autocast=autocast) / saved_bytes(plain, x, autocast=autocast)


def linear(dtype=torch.bfloat16):
    return nn.Linear(1024, 1024, dtype=dtype), torch.randn(256, 1024, dtype=dtype).requires_grad_()


def conv(dtype=torch.bfloat16):
    return nn.Conv2d(64, 64, 3, padding=1, dtype=dtype), torch.randn(2, 64, 12, 12, dtype=dtype).requires_grad_()


def test_the_yardstick_sees_what_a_plain_layer_and_plain_autograd_save():
    plain, x = linear()
    assert saved_bytes(plain, x) == 256 * 1024 * 2
    model = nn.Sequential(copy.deepcopy(plain))
    convert(model, "int4-g128")
    quantizer = model[0].quantizer("weight")

    class Composed(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, quantizer(self.weight), self.bias)

    composed = Composed(1024, 1024, dtype=torch.bfloat16)
    assert (
        saved_bytes(composed, x) >= 256 * 1024 * 2 + 1024 * 1024 * 2
    )  # the copy that the converted layer does not keep


@pytest.mark.parametrize("weight", WEIGHT_ONLY)
def test_a_quantized_weight_costs_nothing(weight):
    plain, x = linear()
    assert ratio(plain, weight, x) <= 1.02


@pytest.mark.parametrize("input", INPUTS)
@pytest.mark.parametrize("weight", ["int4-g128", "int4-lsq"])
def test_a_quantized_input_is_saved_as_codes(weight, input):
    plain, x = linear()
    assert ratio(plain, {"weight": weight, "input": input}, x) <= 0.60


@pytest.mark.parametrize("input", ["int4-g32", "nvfp4"])
def test_group_scales_of_inputs_cost_their_own_bytes(input):
    plain, x = linear()
    per_value = {"int4-g32": 1 + 4 / 32, "nvfp4": 1 + 4 / 16}[input]
    assert ratio(plain, {"weight": "int4-g128", "input": input}, x) <= per_value / 2 * 1.01


def test_a_learned_input_scale_needs_the_input_itself():
    plain, x = linear()
    model = nn.Sequential(copy.deepcopy(plain))
    convert(model, {"*": {"weight": "int4-lsq", "input": "int8-tensor-lsq"}})
    model[0].quantizer("input").initialize(x.detach())
    assert saved_bytes(model[0], x) <= 1.02 * saved_bytes(plain, x)


@pytest.mark.parametrize("weight", ["int4-g32", "int4-lsq", "nvfp4", "ternary"])
def test_under_autocast(weight):
    plain, x = linear(torch.float32)
    bytes_of_x = 256 * 1024 * 2  # as bfloat16; the plain layer keeps its cast weight besides
    assert saved_bytes(plain, x, autocast=True) >= bytes_of_x + 1024 * 1024 * 2
    for scheme, bound in ((weight, 1.02), ({"weight": weight, "input": "int8-token"}, 0.60)):
        model = nn.Sequential(copy.deepcopy(plain))
        convert(model, {"*": scheme})
        assert saved_bytes(model[0], x, autocast=True) <= bound * bytes_of_x


@pytest.mark.parametrize("scheme", ["int4-g32", {"weight": "int4-g32", "input": "int8-token"}], ids=str)
def test_a_frozen_weight_needs_no_input(scheme):
    plain, x = linear()
    plain.weight.requires_grad_(False)
    assert saved_bytes(plain, x) == 0
    model = nn.Sequential(plain)
    convert(model, {"*": scheme})
    assert saved_bytes(model[0], x) <= 256 * 4  # at most the tokens' scales


def test_several_layers_on_one_input_share_what_they_save_of_it():
    plain, x = linear()
    model = nn.ModuleList(copy.deepcopy(plain) for _ in range(3))
    convert(model, "int4-g128")

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, x):
            return sum(layer(x) for layer in self.layers)

    assert saved_bytes(Three(), x) == saved_bytes(plain, x)


@pytest.mark.parametrize("weight", ["int4-g32", "int4-lsq", "ternary"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_convolutions(weight, dtype):
    plain, x = conv(dtype)
    assert ratio(plain, weight, x) <= 1.02
    assert ratio(plain, {"weight": weight, "input": "int8-tensor"}, x) <= 0.60
    per_position = 4 / (64 * dtype.itemsize)  # a float32 scale per position
    assert ratio(plain, {"weight": weight, "input": "int8-token"}, x) <= 1 / dtype.itemsize + per_position + 0.02


def test_embeddings():
    plain = nn.Embedding(4096, 64)
    ids = torch.randint(4096, (8, 32))
    for spec in ("int4-g32", "int4-tensor", "int4-lsq"):
        model = nn.Sequential(copy.deepcopy(plain))
        convert(model, {"type:Embedding": spec})
        assert saved_bytes(model[0], ids) <= saved_bytes(plain, ids) + 8 * 32 * 64 // 8 + 4096 * 4
