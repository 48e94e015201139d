"""compressed-tensors artifacts load with `AutoModelForCausalLM.from_pretrained` and compute what was trained."""

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlightning.export.commands import export_module
from qlightning.layers.layer import Twin
from qlightning.layers.scheme import Scheme

INTEGERS = ["int4-g32", "int3-lsq", "int8-tensor-mse", "ternary", "binary"]


@pytest.mark.parametrize("spec", INTEGERS)
def test_integer_weights(kit, spec):
    module = kit.llama(spec)
    proof = export_module(module, "compressed-tensors", kit.out)
    assert proof.passed
    assert str(proof.tolerance) == "0 ulp"
    assert len(proof.layers) == 7
    loaded = AutoModelForCausalLM.from_pretrained(kit.out)
    assert torch.equal(loaded(kit.ids()).logits, kit.logits(module, kit.ids()))


@pytest.mark.parametrize("spec", ["nvfp4", "mxfp4", "fp8e4m3", "fp8e4m3-b16x32", "int4-g32"])
def test_in_bfloat16(kit, spec):
    module = kit.llama(spec, dtype=torch.bfloat16)
    proof = export_module(module, "compressed-tensors", kit.out)
    assert proof.passed
    assert str(proof.tolerance) == "0 ulp"
    assert len(proof.layers) == 7


INPUTS = [
    ("int8", "int8-token"),
    ("int4-g32", "int8-token"),
    ("fp8e4m3", "fp8e4m3-token"),
    ("int8", "int8-token-asym"),
]


@pytest.mark.parametrize(("weight", "input"), INPUTS)
def test_dynamic_inputs(kit, weight, input):
    module = kit.llama(Scheme(weight, input=input))
    proof = export_module(module, "compressed-tensors", kit.out)
    assert proof.passed
    assert str(proof.tolerance) == "0 ulp"
    assert len(proof.layers) == 7


def same_logits(kit, module):
    loaded = AutoModelForCausalLM.from_pretrained(kit.out).requires_grad_(False)
    return torch.equal(loaded(kit.ids()).logits, kit.logits(module, kit.ids()))


@pytest.mark.parametrize("spec", ["int4-asym-lsq", "int3-g16-asym"])
def test_zero_points(kit, spec):
    module = kit.llama(spec)
    proof = export_module(module, "compressed-tensors", kit.out)
    assert proof.passed
    assert str(proof.tolerance) == "0 ulp"
    assert same_logits(kit, module)


@pytest.mark.parametrize("spec", ["fp8e4m3-tensor-lsq", "int8-tensor-asym-ema"])
def test_fixed_input_scales(kit, spec):
    weight = "fp8e4m3" if "fp8" in spec else "int8"
    module = kit.llama(Scheme(weight, input=spec))
    for layer in module.modules():
        if isinstance(layer, Twin):
            layer.quantizer("input").initialize(torch.linspace(-2.5, 3, 64)[None])
    proof = export_module(module, "compressed-tensors", kit.out)
    assert proof.passed
    assert str(proof.tolerance) == "0 ulp"


def test_mixed_bits_and_skipped_layers(kit):
    rules = {
        "*": {"weight": "int4-g32"},
        "mlp.down_proj": {"weight": "int8", "input": "int8-token"},
        "layers.0.self_attn.o_proj": {"weight": "fp8e4m3"},
        "layers.0.mlp.up_proj": None,
        "lm_head": "int8",
    }
    module = kit.llama(rules)
    assert export_module(module, "compressed-tensors", kit.out).passed
    assert same_logits(kit, module)
    config = json.loads((kit.out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == ["model.layers.0.mlp.up_proj"]
    targets = [set(group["targets"]) for group in config["config_groups"].values()]
    assert {"model.layers.0.mlp.down_proj"} in targets
    assert sum(map(len, targets)) == 7


@pytest.mark.parametrize("drop", [[], ["codes"]])
def test_tied_weights(kit, drop):
    """Left in float they stay tied; quantized alike, the head is packed and the embedding holds its values."""
    rules = {"*": "int4-g32", "type:Embedding": "int8", "lm_head": "int8"} if drop else "int4-g32"
    module = kit.llama(rules, tied="share" if drop else "float", tie_word_embeddings=True)
    if drop:
        with pytest.raises(
            ValueError, match=r"codes of 1 layer: .*only linear layers and experts are packed \(model.embed_tokens"
        ):
            export_module(module, "compressed-tensors", kit.out)
    proof = export_module(module, "compressed-tensors", kit.out, drop=drop)
    assert proof.passed
    assert same_logits(kit, module)
    names = load_file(kit.out / "model.safetensors")
    assert ("lm_head.weight_packed" in names) == bool(drop)
    assert "model.embed_tokens.weight" in names
    assert json.loads((kit.out / "config.json").read_text())["tie_word_embeddings"] == (not drop)


@pytest.mark.parametrize(
    ("spec", "args"),
    [
        ("int4-g32", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
        ("int3-g32-asym", {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}),
        ("int4", {"num_bits": 4, "type": "int", "strategy": "channel"}),
        ("nvfp4", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
        ("mxfp4", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}),
    ],
)
def test_bytes_are_those_of_compressed_tensors_itself(kit, spec, args):
    """Its own compressor, given our values and scales."""
    module = kit.llama(spec, dtype=torch.bfloat16)
    export_module(module, "compressed-tensors", kit.out)
    name = "model.layers.0.mlp.down_proj"
    ours = {k.removeprefix(f"{name}."): v for k, v in load_file(kit.out / "model.safetensors").items() if name in k}
    layer = module.model.get_submodule(name)
    stored = layer.quantizer("weight").quantize(layer.weight)
    scale = stored.scale.bfloat16().flatten(1)
    given = {
        "weight": layer.quantizer("weight")(layer.weight).detach(),
        "weight_scale": scale,
    }
    if stored.zero_point is not None:
        given["weight_zero_point"] = stored.zero_point.flatten(1)
    if stored.tensor_scale is not None:
        given["weight_global_scale"] = stored.tensor_scale
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    theirs = BaseCompressor.get_value_from_registry(infer_module_format(torch.nn.Linear, scheme).value)
    compressed = theirs.compress(given, scheme)
    assert ours.keys() == compressed.keys()
    for key, tensor in compressed.items():
        assert ours[key].dtype == tensor.dtype, key
        if args["type"] == "float" and key == "weight_packed":
            ours[key], tensor = (_without_negative_zeros(packed) for packed in (ours[key], tensor))
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=0, msg=key)


def _without_negative_zeros(packed):
    low, high = packed & 15, packed >> 4
    return torch.where(low == 8, 0, low), torch.where(high == 8, 0, high)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("nf4-g32", r"Levels.* is neither an integer of at most 8 bits nor one of its floats"),
        ("int16", r"Int\(16\) is neither an integer"),
        ("int4-b16x16", r"scales per group, channel or tensor there, not PerBlock\(16, 16\)"),
        ("nvfp4", r"in bfloat16 alone: write dtype='bfloat16'"),
        ({"*": {"weight": "int8", "input": "int4-token"}}, r"inputs are int8 or fp8e4m3 there, not Int\(4\)"),
        ({"*": {"weight": "int8", "input": "int8-g16"}}, "inputs have an absmax scale per token or a fixed one"),
        (
            {"*": "int4-g32-asym", "down_proj": "int8"},
            r"packed zero points \(model.layers.0.self_attn.q_proj.weight\) only",
        ),
        ({"*": {"weight": "int8", "kv_cache": "int8-token"}}, "one fixed scale there, kv_cache='fp8e4m3-tensor-lsq'"),
        ({"*": {"weight": "int8", "output": "int8-token"}}, "only inputs of linear layers, keys and values"),
    ],
)
def test_what_it_has_no_place_for(kit, rules, message):
    with pytest.raises(ValueError, match=message):
        export_module(kit.llama(rules), "compressed-tensors", kit.out)
    assert not kit.out.exists()


@pytest.mark.parametrize("format", ["compressed-tensors", "torchao"])
def test_scales_in_another_dtype(kit, format):
    """Trained in float32, served in bfloat16: scales that were not rounded to it would change."""
    module = kit.llama("int4-g32")
    with pytest.raises(ValueError, match=r"its scales are float32 and the artifact's bfloat16: .* 'int4-g128-sbf16'"):
        export_module(module, format, kit.out, dtype="bfloat16")
    module = kit.llama("int4-g32-sbf16")
    assert export_module(module, format, kit.out).outputs.largest == 0
    proof = export_module(module, format, kit.out, dtype="bfloat16", force=True)
    assert proof.passed
    loaded = AutoModelForCausalLM.from_pretrained(kit.out, dtype="auto")
    loaded(kit.ids())
    weight = loaded.model.layers[0].mlp.up_proj.weight
    values = module.model.model.layers[0].mlp.up_proj
    expected = values.quantizer("weight")(values.weight).bfloat16()
    assert torch.equal(weight.dequantize() if format == "torchao" else weight, expected)


def test_a_model_trained_in_float32_served_in_four_bit_floats(kit):
    """They are computed with in bfloat16 alone; their scales have dtypes of their own."""
    proof = export_module(kit.llama("nvfp4"), "compressed-tensors", kit.out, dtype="bfloat16")
    assert proof.passed
    assert "trained in float32, exported in bfloat16" in str(proof.tolerance)


def test_without_its_inputs_an_int8_layer_is_packed(kit):
    module = kit.llama(Scheme("int8", input="int4-token"))
    assert export_module(module, "compressed-tensors", kit.out, drop=["input"]).passed
    assert json.loads((kit.out / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"


def test_codes_without_a_place_stay_on_their_grid(kit):
    module = kit.llama({"*": "int4-g32", "mlp.down_proj": "nf4-g32"})
    assert export_module(module, "compressed-tensors", kit.out, drop=["codes"]).passed
    assert same_logits(kit, module)
    names = load_file(kit.out / "model.safetensors").keys()
    assert "model.layers.0.mlp.down_proj.weight" in names
    assert "model.layers.0.mlp.up_proj.weight_packed" in names
