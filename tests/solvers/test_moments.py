"""Moments against numpy, and the rows that a layer's weight is multiplied with against the layer itself."""

import numpy as np
import pytest
import torch
from torch import nn

from qlightning.capture import sites_of
from qlightning.layers.convert import convert
from qlightning.numerics.transform import Transform
from qlightning.solvers.moments import Moments, fan_in, gather, group_by_input, visible, write

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4, bias=False), (2, 5, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, bias=False), (2, 4, 7, 8)),
    "conv-stride": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), bias=False), (2, 4, 7, 8)),
    "conv-same": (lambda: nn.Conv2d(4, 6, (2, 3), dilation=(3, 1), padding="same", bias=False), (2, 4, 7, 8)),
    "conv-groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, bias=False), (2, 4, 7, 8)),
    "conv-depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1, bias=False), (2, 4, 7, 8)),
    "conv-reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect", bias=False), (2, 4, 7, 8)),
    "conv-unbatched": (lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False), (4, 7, 8)),
    "t1d": (lambda: nn.ConvTranspose1d(4, 6, 3, bias=False), (2, 4, 9)),
    "t1d-groups": (
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, output_padding=1, bias=False),
        (2, 4, 9),
    ),
    "t2d": (
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), padding=1, output_padding=(1, 2), bias=False),
        (2, 4, 7, 8),
    ),
    "t2d-dilated": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2, padding=5, bias=False), (2, 4, 7, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 9)),
    "conv1d-circular": (
        lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1, padding_mode="circular", bias=False),
        (2, 4, 9),
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_the_weight_are_the_output(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    model, x = nn.Sequential(make()), torch.randn(shape)
    exact = model(x).detach()
    convert(model, "int8")
    site = sites_of(model)[0]
    rows = fan_in(site.layer, x)
    weight = site.weight.unflatten(0, (rows.shape[0], -1))
    products = rows @ weight.transpose(1, 2)
    got = torch.cat([*products.transpose(1, 2)])  # (output channels, tokens)
    if name == "linear":
        wanted = exact.flatten(0, -2).T
    else:
        wanted = exact[None] if name == "conv-unbatched" else exact
        wanted = wanted.movedim(1, 0).flatten(1)
    torch.testing.assert_close(got, wanted)
    write(site, site.weight * 2)
    model[0].quantizer("weight").enabled = False
    torch.testing.assert_close(model(x), 2 * exact)


def test_the_transposed_linear_of_gpt2():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model, x = nn.Sequential(Conv1D(4, 6)), torch.randn(2, 5, 6)
    convert(model, "int8")
    site = sites_of(model)[0]
    model[0].quantizer("weight").enabled = False
    exact = model(x).detach()
    torch.testing.assert_close(fan_in(site.layer, x)[0] @ site.weight.T, exact.flatten(0, 1))
    parameter = model[0].weight
    write(site, site.weight * 2)
    assert model[0].weight is parameter
    torch.testing.assert_close(model(x), 2 * exact)


def test_channels_last_weights_are_written_in_place():
    model = nn.Sequential(nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last)
    convert(model, "int8")
    site, wanted = sites_of(model)[0], torch.randn(6, 36)
    write(site, wanted)
    assert torch.equal(model[0].weight.detach().reshape(6, 36), wanted)
    assert torch.equal(site.weight, wanted)


def test_moments_are_numpys():
    rows, weights = np.random.default_rng(0).normal(size=(2, 50, 5)), np.random.default_rng(1).uniform(size=50)
    moments = Moments.empty(2, 5)
    moments.update(torch.from_numpy(rows[:, :20]), torch.from_numpy(weights[:20]))
    moments.update(torch.from_numpy(rows[:, 20:]), torch.from_numpy(weights[20:]))
    for g in range(2):
        mean = sum(w * np.outer(x, x) for w, x in zip(weights, rows[g], strict=True)) / weights.sum()
        np.testing.assert_allclose(moments.hessian[g].numpy(), mean, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(moments.absmax[g].numpy(), np.abs(rows[g]).max(0))
        np.testing.assert_allclose(moments.sum[g].numpy(), weights @ rows[g])
        np.testing.assert_allclose(moments.abs_sum[g].numpy(), weights @ np.abs(rows[g]))
    assert moments.tokens == 50
    error = torch.from_numpy(np.random.default_rng(2).normal(size=(6, 5)))
    plain = Moments.empty(2, 5)
    plain.update(torch.from_numpy(rows))
    outputs = torch.cat([torch.from_numpy(rows[g]) @ error[3 * g : 3 * g + 3].T for g in range(2)], 1)
    assert plain.loss(error) == pytest.approx(float(outputs.square().sum(1).mean()))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        h = self.b(x) + self.a(x)
        again = self.c(h)
        h += 1  # the same object, another value
        return self.d(h) + again


def test_groups_are_layers_with_one_input():
    model, x = Shared(), torch.randn(3, 4)
    convert(model, "int8")
    with torch.no_grad():
        groups = group_by_input(sites_of(model), lambda: model(x))
        assert [[site.name for site in group] for group in groups] == [["b", "a"], ["c"], ["d"]]
        found = gather(groups, lambda: model(x))
    assert found["a"] is found["b"]
    assert found["c"] is not found["d"]
    torch.testing.assert_close(found["a"].gram[0], x.double().T @ x.double())
    assert not torch.allclose(found["c"].gram, found["d"].gram)


def test_layers_that_see_windows_of_one_input_have_moments_of_their_own():
    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 1)

        def forward(self, x):
            return self.wide(x) + self.narrow(x)

    model, x = Stem(), torch.randn(2, 2, 5, 5)
    convert(model, "int8")
    with torch.no_grad():
        groups = group_by_input(sites_of(model), lambda: model(x))
        found = gather(groups, lambda: model(x))
    assert [len(group) for group in groups] == [2]
    assert found["wide"].gram.shape == (1, 18, 18)
    assert found["narrow"].gram.shape == (1, 2, 2)


def test_what_cannot_be_seen():
    model = nn.Sequential(nn.Embedding(2, 4), nn.Linear(4, 4))
    convert(model, {"*": "int8"} | {"type:Embedding": "int8"})
    assert [visible(site) for site in sites_of(model)] == [False, True]
    with pytest.raises(ValueError, match="cannot be seen"):
        fan_in(model[0], torch.zeros(3, dtype=torch.long))


def test_a_layers_own_transform_comes_first():
    model, x = Shared(), torch.randn(3, 4)
    convert(model, "int8")

    class Half(Transform):
        def build(self, matrix, features):
            pass

        def forward(self, x):
            return x / 2

    model.a.add_module("transform", Half())
    with torch.no_grad():
        found = gather(group_by_input(sites_of(model), lambda: model(x)), lambda: model(x))
    torch.testing.assert_close(found["a"].gram, found["b"].gram / 4)
