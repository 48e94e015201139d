"""A denoiser tells its layers the time step: in every call, in copies, and after loading."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlightning import Scheme, convert, restore
from qlightning.layers.swap import convert_like
from qlightning.layers.timestep import TimestepTwin
from qlightning.numerics import ClippedSTE, Int, Quantizer
from qlightning.numerics.conditioned import StepTable, conditioned
from qlightning.numerics.per_sample import PerSample


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        return self.fc(x)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, timestep: Tensor | int, *, again: bool = False) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def denoiser() -> Any:
    torch.manual_seed(0)
    net = nn.ModuleDict({"unet": Denoiser()})
    table = Quantizer(Int(4), PerSample(), scale=StepTable(10, timesteps=100), gradient=ClippedSTE())
    convert(net, {"*": Scheme("int8", input=table)})
    for i, scale in enumerate(conditioned(net)):
        scale.total_value.fill_(0.1)
        scale.count.fill_(1)
        scale.settle()
        with torch.no_grad():
            scale.value.mul_(torch.arange(1, 11)[:, None] * (i + 1))
    return net


@pytest.mark.parametrize("timestep", [41, torch.tensor(41), torch.tensor([41, 41, 41])])
def test_every_scale_sees_the_step_of_the_call(timestep: Any) -> None:
    net, x = denoiser(), torch.randn(3, 8)
    y = net["unet"](x, timestep)
    assert all(scale.row(3).tolist() == [4, 4, 4] for scale in conditioned(net))
    assert torch.equal(net["unet"](x=x, timestep=timestep), y)
    assert not torch.equal(net["unet"](x, 99), y)


def test_guidance_by_two_calls_or_by_one_is_the_same() -> None:
    net, x = denoiser(), torch.randn(2, 8)
    one = net["unet"](x.repeat(2, 1), torch.tensor([7, 93, 7, 93]))
    assert torch.equal(one, net["unet"](x, torch.tensor([7, 93])).repeat(2, 1))


def test_copies_pickles_and_loaded_models_tell_their_own_layers() -> None:
    net, x = denoiser(), torch.randn(3, 8)
    fresh = nn.ModuleDict({"unet": Denoiser()})
    convert_like(fresh, net.state_dict())
    fresh.load_state_dict(net.state_dict())
    y = net["unet"](x, 41)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), fresh):
        assert not torch.equal(other["unet"](x, 99), y)
        assert torch.equal(other["unet"](x, 41), y)
        assert torch.equal(net["unet"](x, 41), y)


def test_its_class_keeps_its_name_and_comes_back() -> None:
    net = denoiser()
    assert isinstance(net["unet"], TimestepTwin)
    assert type(net["unet"]).__name__ == "Denoiser"
    restore(net)
    assert type(net["unet"]) is Denoiser


def test_a_model_without_such_scales_is_left_alone() -> None:
    net = nn.ModuleDict({"unet": Denoiser()})
    convert(net, Scheme("int8", input="int8-token"))
    assert type(net["unet"]) is Denoiser
