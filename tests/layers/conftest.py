"""The independent twin of every converted layer: the plain layer itself, called with quantized operands.

`composed` builds Q_x(x) and Q_w(w) with `Quantizer.forward` under plain autograd and hands them to the plain layer's
own forward. It finds rows and channels with loops of its own.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlightning.layers.convert import convert
from qlightning.layers.scheme import as_scheme

TOLERANCE = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-4, 1e-5), torch.bfloat16: (0.03, 0.03)}


def rows_of(layer: nn.Module, weight: Tensor) -> Tensor:
    """Every output channel's weights as one row, channel by channel."""
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):
        groups = weight.chunk(layer.groups, dim=0)
        return torch.stack([group[:, o].reshape(-1) for group in groups for o in range(weight.shape[1])])
    if type(layer).__name__ == "Conv1D":
        return torch.stack([weight[:, o] for o in range(weight.shape[1])])
    return torch.stack([weight[o].reshape(-1) for o in range(weight.shape[0])])


def weight_of(layer: nn.Module, rows: Tensor) -> Tensor:
    """The inverse of `rows_of`."""
    shape = layer.weight.shape
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):
        per_group = rows.chunk(layer.groups, dim=0)
        inputs = shape[0] // layer.groups
        return torch.cat([torch.stack([r.view(inputs, *shape[2:]) for r in group], dim=1) for group in per_group])
    if type(layer).__name__ == "Conv1D":
        return torch.stack(list(rows), dim=1)
    return rows.reshape(shape)


def channels_last(layer: nn.Module, x: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """`transform` of x with the layer's features in the last dimension."""
    spatial = {"Conv1d": 1, "Conv2d": 2, "ConvTranspose1d": 1, "ConvTranspose2d": 2}.get(type(layer).__name__, 0)
    if not spatial:
        return transform(x)
    return transform(x.movedim(-1 - spatial, -1)).movedim(-1, -1 - spatial)


class Pair:
    """A converted layer and, from the same start, its plain layer with quantizers of its own."""

    def __init__(self, plain: nn.Module, scheme: Any, x: Tensor) -> None:
        self.plain, self.holder = plain, nn.Sequential(copy.deepcopy(plain))
        self.holder.train(plain.training)
        convert(self.holder, {"0": as_scheme(scheme)})
        self.layer = self.holder[0]
        quantizer = self.layer.quantizer("input")
        if quantizer is not None:
            channels_last(plain, x.detach(), lambda rows: quantizer.initialize(rows) or rows)
        self.quantizers = nn.ModuleDict({name: copy.deepcopy(q) for name, q in self.layer.quantizers()})

    def composed(self, x: Tensor, *args: Any) -> Tensor:
        apply = self.quantizers
        parameters = dict(self.plain.named_parameters())
        if "weight" in apply:
            parameters["weight"] = weight_of(self.plain, apply["weight"](rows_of(self.plain, self.plain.weight)))
        if "input" in apply:
            x = channels_last(self.plain, x, apply["input"])
        y = torch.func.functional_call(self.plain, parameters, (x, *args))
        return channels_last(self.plain, y, apply["output"]) if "output" in apply else y

    def leaves(self) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
        """(name, the converted layer's, the composition's) of weight, bias, learned steps and offsets."""
        ours = dict(self.layer.named_parameters())
        theirs = dict(self.plain.named_parameters())
        theirs |= {f"{n.replace('.', '_quantizer.', 1)}": p for n, p in self.quantizers.named_parameters()}
        assert ours.keys() == theirs.keys()
        return [(name, ours[name], theirs[name]) for name in ours]


def compare(
    plain: nn.Module, scheme: Any, x: Tensor, *args: Any, autocast: bool = False, frozen: tuple[str, ...] = ()
) -> Pair:
    """Assert equal outputs and equal gradients of x and of every parameter that is not frozen."""
    pair = Pair(plain, scheme, x)
    for name, ours, theirs in pair.leaves():
        if name in frozen:
            ours.requires_grad_(False)
            theirs.requires_grad_(False)
    x_ours, x_theirs = (x.detach().clone().requires_grad_("x" not in frozen) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y_ours, y_theirs = pair.layer(x_ours, *args), pair.composed(x_theirs, *args)
        y_plain = plain(x, *args)
    assert y_ours.dtype == y_theirs.dtype == y_plain.dtype
    rtol, atol = TOLERANCE[torch.bfloat16 if autocast else x.dtype]
    if isinstance(plain, nn.Linear):
        assert torch.equal(y_ours, y_theirs)
    else:  # the same values in another memory layout are summed in another order
        torch.testing.assert_close(y_ours, y_theirs, rtol=rtol, atol=atol)
    grad = torch.randn(y_ours.shape, generator=torch.Generator().manual_seed(1)).to(y_ours.dtype)
    y_ours.backward(grad)
    y_theirs.backward(grad)
    checked = [("x", x_ours, x_theirs), *pair.leaves()]
    for name, ours, theirs in checked:
        if name in frozen:
            assert ours.grad is None, name
            continue
        assert ours.grad is not None, name
        assert ours.grad.dtype == ours.dtype, name
        scale = max(float(theirs.grad.abs().max()), 1e-6) if theirs.grad.numel() else 1.0
        torch.testing.assert_close(ours.grad / scale, theirs.grad / scale, rtol=rtol, atol=atol, msg=name)
    return pair


@pytest.fixture(name="compare", scope="session")
def _compare() -> Callable[..., Pair]:
    return compare


@pytest.fixture(name="pair", scope="session")
def _pair() -> type[Pair]:
    return Pair


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
