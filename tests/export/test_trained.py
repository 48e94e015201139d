"""What is exported is what the converted layers compute with."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig
from transformers.pytorch_utils import Conv1D

from qlightning.adapters.lora import LoRA
from qlightning.export.plain import Plain
from qlightning.export.target import TRANSFORM, make_plan, targets
from qlightning.export.trained import Trained
from qlightning.layers.convert import convert, restore
from qlightning.layers.scheme import Scheme
from qlightning.numerics.codebooks import Levels
from qlightning.numerics.granularity import PerGroup
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.transform import Transform

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 16, generator=GENERATOR)
IMAGE = torch.randn(2, 4, 6, 6, generator=GENERATOR)
LAYERS = {
    "linear": (lambda: nn.Linear(16, 8), (X,)),
    "transposed linear": (lambda: Conv1D(8, 16), (X,)),
    "conv": (lambda: nn.Conv2d(4, 8, 3, groups=2), (IMAGE,)),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 8, 3, groups=2), (IMAGE,)),
    "embedding": (lambda: nn.Embedding(10, 16), (torch.tensor([[1, 2, 9]]),)),
    "attention": (lambda: nn.MultiheadAttention(16, 2, batch_first=True), (X[None], X[None], X[None])),
    "attention of other sizes": (lambda: nn.MultiheadAttention(16, 2, kdim=16, vdim=16), (X[None], X[None], X[None])),
}


def outputs(module, args):
    with torch.no_grad():
        y = module[0](*args)
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("layer", LAYERS)
def test_values_in_the_parameter_s_shape_give_the_trained_layer(layer):
    make, args = LAYERS[layer]
    torch.manual_seed(0)
    module = nn.Sequential(make()).eval()
    kind = type(module[0]).__name__
    convert(module, {f"type:{kind}": "int3-asym"})
    trained = Trained(module)
    plain = restore(copy.deepcopy(module))
    before = outputs(plain, args)
    weights = {weight.name: weight.values() for weight in trained.weights}
    plain.load_state_dict({**plain.state_dict(), **weights})
    assert weights
    assert torch.equal(outputs(plain, args), outputs(module, args))
    assert not torch.equal(outputs(plain, args), before)
    assert {**weights, **dict(trained.floats())}.keys() == plain.state_dict().keys()


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_experts(transposed):
    config = MixtralConfig(
        vocab_size=16, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    convert(model, "int4-g8")
    experts = model.model.layers[0].mlp.experts
    if transposed:
        for name in ("gate_up_proj", "down_proj"):
            setattr(experts, name, nn.Parameter(getattr(experts, name).transpose(1, 2).contiguous()))
        experts.is_transposed = True
    (layer,) = [layer for layer in Trained(model).layers if layer.name.endswith("experts")]
    for weight in layer.weights:
        parameter, own = experts.get_parameter(weight.prefix), weight.values()
        assert own.shape == parameter.shape
        rows = parameter.transpose(1, 2) if transposed else parameter
        expected = weight.quantizer(rows.flatten(0, 1)).view(rows.shape)
        assert torch.equal(own, expected.transpose(1, 2) if transposed else expected)
        assert parameter.is_floating_point()  # the layer has its own parameter back


def test_codes_are_the_quantizer_s_own():
    module = nn.Sequential(nn.Linear(16, 8)).eval()
    convert(module, {"0": "int4-g8"})
    (weight,) = Trained(module).weights
    assert weight.name == "0.weight"
    assert weight.has_codes
    assert weight.scale_dtype == torch.float32
    stored = weight.quantize()
    assert torch.equal(weight.quantizer.dequantize(stored, torch.float32), weight.values())
    assert torch.equal(weight.values(torch.bfloat16), weight.values().bfloat16())


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        *(("int4-g8", 4), ("int4-narrow", 4), ("int1-asym", 1), ("int16", 16), ("ternary", 2), ("binary", 2)),
        *(("nf4-g8", None), ("fp8e4m3", None), ("log3", None), (Quantizer(Levels([-3.0, 0.0, 2.0]), PerGroup(8)), 3)),
    ],
    ids=str,
)
def test_formats_of_integers(spec, bits):
    module = nn.Sequential(nn.Linear(16, 8)).eval()
    convert(module, {"0": spec})
    (weight,) = Trained(module).weights
    assert weight.integer_bits == bits
    if bits is not None:
        stored = weight.quantize()
        integers, scale = weight.integers(stored.codes), weight.by_group(stored.scale)
        zero = 0 if stored.zero_point is None else weight.by_group(stored.zero_point)[..., None]
        values = (integers.float().view(8, scale.shape[1], -1) - zero) * scale[..., None]
        assert torch.equal(values.view(8, 16), weight.values())
        assert -(2 ** (bits - 1)) <= int(integers.min())
        assert int(integers.max()) < 2 ** (bits - 1) or bits == 1


def test_the_transformers_model_in_a_module_is_what_is_exported(kit):
    module = kit.llama()
    trained = Trained(module)
    assert trained.model is module.model
    assert trained.config is module.model.config
    assert [layer.kind for layer in trained.layers] == ["Linear"] * 7
    names = {weight.name for weight in trained.weights}
    assert "model.layers.0.mlp.down_proj.weight" in names
    assert names | {name for name, _ in trained.floats()} == set(restore(copy.deepcopy(module.model)).state_dict())


def test_a_model_beside_other_parameters_is_not_all_of_it():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                 num_attention_heads=1)  # fmt: skip
            self.model = AutoModelForCausalLM.from_config(config)
            self.value = nn.Linear(8, 1)

    module = Two().eval()
    convert(module, "int4-g8", min_coverage=0)
    assert Trained(module).model is module
    assert Trained(module).config is None


def test_tied_names():
    module = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16), nn.Linear(16, 8, bias=False)).eval()
    module[2].weight = module[0].weight
    convert(module, {"*": "int4-g8", "type:Embedding": "int4-g8"}, tied="share")
    trained = Trained(module)
    assert dict(trained.tied()) == {"2.weight": "0.weight"}
    values = {weight.name: weight.values() for weight in trained.weights}
    assert torch.equal(values["0.weight"], values["2.weight"])
    assert {name for name, _ in trained.floats()} == {"1.bias"}


def test_activations_that_act():
    module = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)).eval()
    convert(module, {"*": {"weight": "int4-g8", "input": "int8-token", "output": "int8-token"}})
    module[1].quantizer("output").enabled = False
    placements = [set(layer.activations) for layer in Trained(module).layers]
    assert placements == [{"input", "output"}, {"input"}]


def test_what_cannot_be_exported():
    module = nn.Sequential(nn.Linear(16, 8))
    with pytest.raises(ValueError, match="nothing in the module is quantized"):
        Trained(module.eval())
    convert(module, {"0": "int4-g8"})
    with pytest.raises(ValueError, match=r"call module.eval\(\) first"):
        Trained(module.train())
    module.eval()[0].quantizer("weight").enabled = False
    with pytest.raises(ValueError, match=r"do not act yet \(0.weight\).*later checkpoint"):
        Trained(module)


def test_released_weights_are_float():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)).eval()
    convert(module, {"*": {"weight": "int4-g8", "input": "int8-token"}})
    for prefix in ("weight", "input"):
        module[0].quantizer(prefix).release()
    trained = Trained(module)
    assert [weight.name for weight in trained.weights] == ["1.weight"]
    assert [set(layer.activations) for layer in trained.layers] == [set(), {"input"}]
    assert torch.equal(dict(trained.floats())["0.weight"], module[0].weight)
    for prefix in ("weight", "input"):
        module[1].quantizer(prefix).release()
    with pytest.raises(ValueError, match=r"all quantizers of the module were released.*qlightning.restore\(module\)"):
        Trained(module)


class Flip(Transform):
    """Negates the input."""

    def build(self, matrix, features):
        pass

    def forward(self, x):
        return -x


@pytest.mark.parametrize("base", ["float", "fixed", "codes"])
def test_an_adapter_inside_the_quantizer_is_merged(base):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 8)).eval()
    convert(module, {"0": Scheme("int4-channel-lsq", adapter=LoRA(rank=2, base=base))})
    nn.init.normal_(module[0].adapter.b, std=0.1)
    trained = Trained(module)
    assert {name for name, _ in trained.floats()} == {"0.bias"}
    assert trained.dtype == torch.float32
    (weight,) = trained.weights
    assert weight.parameter.is_floating_point() == (base == "float")
    plain = nn.Linear(16, 8)
    plain.load_state_dict({"weight": weight.values(), "bias": module[0].bias})
    with torch.no_grad():
        assert torch.equal(plain(X), module(X))
    assert torch.equal(weight.quantizer.dequantize(weight.quantize(), torch.float32), weight.values())
    module[0].adapter.b.data.zero_()
    assert not torch.equal(weight.values(), plain.weight)


def test_a_transform_of_the_input_is_known():
    module = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)).eval()
    convert(module, {"0": Scheme("int4-g8", transform=Flip()), "1": "int4-g8"})
    trained = Trained(module)
    assert [layer.transform is None for layer in trained.layers] == [False, True]
    said = r"plain has no place for Flip\(\), the transform of the input of 0, .*: a plain model .*write format='onnx'"
    with pytest.raises(ValueError, match=said):
        make_plan(Plain(), trained, drop=["transform"])


@pytest.mark.parametrize("name", targets())
def test_every_target_that_refuses_a_transform_says_why(name):
    module = nn.Sequential(nn.Linear(16, 8)).eval()
    convert(module, Scheme("int4-g8", transform=Flip()))
    (layer,) = Trained(module).layers
    why = targets()[name]().misplaced(layer, TRANSFORM, torch.float32)
    assert (why is None) == (name == "onnx")
    assert "quantized" not in (why or "")  # an answer to another question
