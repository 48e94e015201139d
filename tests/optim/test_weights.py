"""The weights as optimizer-side methods see them are those that the layers multiply with."""

import pytest
import torch
from torch import nn

from qlightning.layers.convert import convert, quantizers_of
from qlightning.numerics import EMA, Int, PerTensor, Quantizer
from qlightning.optim import weights_of
from qlightning.optim.weights import learning_rates


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(8, 10, bias=False)


def test_every_kind_of_layer() -> None:
    model = Both()
    convert(model, {"*": "int4-channel", "type:Embedding": "int8-channel"})
    weights = {weight.name: weight for weight in weights_of(model)}
    assert list(weights) == ["table.weight", "conv.weight", "head.weight"]
    for weight in weights.values():
        assert torch.equal(weight.quantized(), weight.quantizer(weight.layer.weights()["weight"]))
        laid_out = weight.like_parameter(weight.matrix())
        assert laid_out.shape == weight.parameter.shape
        assert torch.equal(laid_out, weight.parameter)
    assert weights["conv.weight"].matrix().shape == (4, 9)


def test_a_transposed_weight() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(6, 8))
    convert(model, "int4-channel")
    (weight,) = weights_of(model)
    assert weight.matrix().shape == (6, 8)
    assert torch.equal(weight.like_parameter(weight.matrix()), model[0].weight)


def test_the_rounding_is_that_of_the_step() -> None:
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    convert(model, "int4-channel-sr")
    (weight,) = weights_of(model)
    first = weight.quantized()
    assert torch.equal(first, model(torch.eye(64)).t())
    weight.quantizer.rounding.advance()
    assert not torch.equal(first, weight.quantized())
    assert torch.equal(weight.quantized(), model(torch.eye(64)).t())


def test_looking_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    convert(model, Quantizer(Int(8), PerTensor(), scale=EMA(decay=0.5)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model[0].weight.data.mul_(4)
    (weight,) = weights_of(model)
    weight.quantized()
    model[0].weight.data.div_(4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_does_not_act_is_left_out_and_what_is_shared_counts_once() -> None:
    model = Both()
    model.head.weight = model.table.weight
    convert(model, {"*": "int4-channel", "type:Embedding": "int4-channel"}, tied="share")
    assert [weight.name for weight in weights_of(model)] == ["table.weight", "conv.weight"]
    for name, quantizer in quantizers_of(model):
        quantizer.enabled = name.startswith("conv")
    assert [weight.name for weight in weights_of(model)] == ["conv.weight"]


def test_learning_rates() -> None:
    a, b, frozen = (nn.Parameter(torch.zeros(1), requires_grad=grad) for grad in (True, True, False))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b, frozen], "lr": torch.tensor(0.25)}], lr=0.5)
    assert learning_rates(optimizer) == {id(a): 0.5, id(b): 0.25}


def test_sharded_weights_are_refused(tmp_path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(8, 4))
        convert(model, "int4-channel")
        mesh = init_device_mesh("cpu", (1,))
        model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.data, mesh, [Shard(0)]))
        with pytest.raises(ValueError, match=r"0\.weight is sharded.*strategy='ddp'"):
            list(weights_of(model))
    finally:
        torch.distributed.destroy_process_group()
