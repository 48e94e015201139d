"""GGUF files hold our codes; the gguf package's own dequantizer and transformers compute what was trained."""

import re

import gguf
import pytest
import torch

from qlightning.export.commands import export_module
from qlightning.export.gguf import FILE, GGUF, _kind, _packed
from qlightning.export.trained import Trained
from qlightning.layers.convert import convert

KINDS = [
    ("gguf-q4_0", "Q4_0"),
    ("int4-g32-sfp16", "Q4_0"),
    ("int3-g64-lsq-sfp16", "Q4_0"),
    ("int2-channel-sfp16", "Q4_0"),
    ("ternary-g32-sfp16", "Q4_0"),
    ("gguf-q4_1", "Q4_1"),
    ("gguf-q8_0", "Q8_0"),
    ("int8-tensor-sfp16", "Q8_0"),
    ("gguf-tq2_0", "TQ2_0"),
    ("ternary-sfp16", "TQ2_0"),
    ("binary-channel-sfp16", "TQ2_0"),
    ("mxfp4", "MXFP4"),
]


def weight_of(spec, dtype=torch.float32, shape=(24, 512)):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False)).to(dtype)
    with torch.no_grad():
        module[0].weight[1, :64] = 0
        module[0].weight[2] *= 1e-3
    convert(module, spec, min_coverage=0.0)
    (weight,) = Trained(module.eval()).weights
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("spec", "kind"), KINDS)
def test_their_dequantizer_gives_our_values(spec, kind, dtype):
    weight = weight_of(spec, dtype)
    assert _kind(weight, "tq2_0") == kind
    packed = _packed(weight, kind).numpy()
    theirs = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind]))
    assert torch.equal(theirs.to(dtype), weight.values())
    assert theirs.abs().max() > 0


@pytest.mark.parametrize(
    ("spec", "kind"),
    [("gguf-q4_0", "Q4_0"), ("gguf-q8_0", "Q8_0"), ("gguf-tq2_0", "TQ2_0"), ("gguf-tq2_0", "TQ1_0")],
)
def test_bytes_are_those_of_their_quantizer(spec, kind):
    """Given the float weight where the spec is its own rule, and our values where they are ternary."""
    weight = weight_of(spec)
    source = weight.values() if "TQ" in kind else weight.parameter
    theirs = gguf.quants.quantize(source.detach().numpy(), gguf.GGMLQuantizationType[kind])
    ours = _packed(weight, kind).view(24, 512 // gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0], -1)
    theirs = torch.from_numpy(theirs).view(ours.shape)
    kept = weight.values().view(*ours.shape[:2], -1).abs().amax(-1) > 0  # a block of zeros may have any step
    assert torch.equal(ours[kept], theirs[kept])
    assert int(kept.sum()) > kept.numel() - 5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("int4-g32", "scales are float16 there, and its float32 ones would be rounded: train with 'gguf-q4_0'"),
        ("int4-g16-sfp16", r"not PerGroup\(16\): train with 'gguf-q4_0'"),
        ("int8-g16-sfp16", r"not PerGroup\(16\): train with 'gguf-q8_0'"),
        ("int4-g32-asym-sfp16", "scales and minima are float16 there, and its own would be rounded: .*'gguf-q4_1'"),
        ("int8-asym-sfp16", "zero points are integers of at most 4 bits there: train with 'gguf-q4_1'"),
        ("nf4-g32", "is no integer of at most 8 bits: train with 'gguf-q4_0'"),
        ("nvfp4", "write 'mxfp4'"),
        ("int16-sfp16", r"Int\(16\) is no integer of at most 8 bits"),
    ],
)
def test_a_misfit_names_the_spec_that_fits(spec, message):
    assert re.search(message, GGUF().misfit(weight_of(spec), torch.float32))


def test_rows_that_are_no_blocks():
    assert "rows of 48 values are no blocks of 32" in GGUF().misfit(weight_of("int4-sfp16", shape=(4, 48)), None)


@pytest.mark.parametrize("spec", ["gguf-q4_0", "gguf-q4_1", "gguf-q8_0", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_llama_through_transformers(kit, spec, dtype):
    proof = export_module(kit.llama(spec, dtype=dtype), "gguf", kit.out)
    assert proof.passed
    assert str(proof.tolerance) == "0 ulp"
    assert len(proof.layers) == 7
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(kit.out / FILE).tensors}
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == spec.removeprefix("gguf-").upper()
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert tensors["token_embd.weight"].tensor_type.name == ("F32" if dtype == torch.float32 else "BF16")


@pytest.mark.parametrize("ternary", ["tq1_0", "tq2_0"])
def test_a_ternary_llama(kit, ternary):
    module = kit.llama("ternary-sfp16", hidden_size=256, intermediate_size=256)
    assert export_module(module, "gguf", kit.out, options={"ternary": ternary}).passed
    reader = gguf.GGUFReader(kit.out / FILE)
    assert {t.tensor_type.name for t in reader.tensors if t.name.startswith("blk.0.ffn_up")} == {ternary.upper()}
    file_type = gguf.LlamaFileType(reader.get_field("general.file_type").contents())
    assert file_type.name == f"MOSTLY_{ternary.upper()}"


@pytest.mark.parametrize("tied", ["float", "share"])
def test_tied_and_quantized_embeddings(kit, tied):
    rules = {"*": "gguf-q4_0", "type:Embedding": "gguf-q8_0", "lm_head": "gguf-q8_0", "mlp.up_proj": None}
    module = kit.llama(rules if tied == "share" else "gguf-q4_0", tied=tied, tie_word_embeddings=True)
    assert export_module(module, "gguf", kit.out).passed
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(kit.out / FILE).tensors}
    assert "output.weight" not in kinds
    assert kinds["token_embd.weight"] == ("Q8_0" if tied == "share" else "F32")


def test_a_quantized_head_and_codes_without_a_place(kit):
    rules = {"*": "gguf-q4_0", "lm_head": "gguf-q8_0", "self_attn.q_proj": "nf4-g32"}
    module = kit.llama(rules)
    with pytest.raises(ValueError, match="'gguf-q4_0'"):
        export_module(module, "gguf", kit.out)
    assert export_module(module, "gguf", kit.out, drop=["codes"]).passed
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(kit.out / FILE).tensors}
    assert (kinds["output.weight"], kinds["blk.0.attn_q.weight"], kinds["blk.0.attn_k.weight"]) == (
        "Q8_0",
        "F32",
        "Q4_0",
    )


def test_other_models_and_activations(kit):
    with pytest.raises(ValueError, match="only language models of transformers"):
        export_module(kit.plain("gguf-q4_0"), "gguf", kit.out)
    module = kit.llama({"*": {"weight": "gguf-q4_0", "input": "int8-token"}})
    with pytest.raises(ValueError, match=r"train with input='gguf-q8_0'"):
        export_module(module, "gguf", kit.out)
