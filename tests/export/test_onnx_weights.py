"""onnxruntime's DequantizeLinear gives our values, bit for bit, and codes take the bits they have."""

import pytest
import torch
from torch import nn

from qlightning.export.commands import export_module
from qlightning.export.onnx import DATA, FILE, ONNX
from qlightning.export.onnx_runtime import Runtime
from qlightning.export.target import make_plan
from qlightning.export.trained import Trained
from qlightning.layers.convert import convert

# with the bits that a code takes
GRIDS = {
    **{"int8": 8, "int8-asym": 8, "int8-tensor": 8, "int6-channel-narrow": 8, "int4": 4, "int4-g16": 4},
    **{"int4-g16-asym": 4, "int3-g8": 4, "int4-g16-lsq": 4, "int4-b4x8": 4, "ternary": 2, "binary-channel": 2},
    **{"int2-g16": 2, "fp8e4m3": 8, "fp8e5m2-g16": 8, "int4-g16-sfp16": 4},
}
IN_FOUR_BITS = {"ternary": 4, "binary-channel": 4, "int2-g16": 4}


class Layers(nn.Module):
    """One of each layer, with what is odd about its weight's layout."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 16)
        self.linear = nn.Linear(16, 16)
        self.conv = nn.Conv2d(16, 16, 3, padding="same", groups=2)
        self.up = nn.ConvTranspose2d(16, 32, 2, stride=2, groups=2)
        self.line = nn.ConvTranspose1d(32, 16, 4)

    def forward(self, ids):
        x = self.linear(self.embedding(ids)).transpose(1, 2)
        return self.line(self.up(self.conv(x.unflatten(2, (2, -1)))).flatten(2))


def check_weights(folder, module):
    trained = Trained(module)
    runtime = Runtime(folder / FILE, trained)
    for weight in trained.weights:
        theirs = runtime.weight(weight.name)
        ours = weight.quantizer.dequantize(weight.quantize(), torch.float32)
        assert torch.equal(theirs.view(ours.shape), ours), weight.name
        assert ours.abs().max() > 0


@pytest.mark.parametrize(("opset", "grids"), [(21, IN_FOUR_BITS), (25, GRIDS)], ids=["21", "25"])
def test_every_grid(tmp_path, opset, grids):
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in grids))
    convert(module, {str(i): spec for i, spec in enumerate(grids)})
    proof = export_module(
        module.eval(), "onnx", tmp_path / "out", data=[torch.randn(2, 3, 32)], options={"opset": opset}
    )
    assert proof.passed
    assert len(proof.layers) == len(grids)
    check_weights(tmp_path / "out", module)
    scales = 7 * 32 * 4 * 4  # at most 4 groups each; what is smaller than 256 bytes is in the other file
    assert 0 <= (tmp_path / "out" / DATA).stat().st_size - 32 * 32 * sum(grids.values()) // 8 <= scales


@pytest.mark.parametrize("spec", ["int8", "int4-g8-asym"])
def test_every_layer(tmp_path, spec):
    torch.manual_seed(0)
    module = Layers()
    convert(module, {"*": spec, "type:Embedding": spec}, min_coverage=0)
    proof = export_module(module.eval(), "onnx", tmp_path / "out", data=[torch.arange(8).view(2, 4)])
    assert proof.passed
    assert len(proof.layers) == 5
    check_weights(tmp_path / "out", module)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nf4-g16", "neither an integer of at most 8 bits nor fp8: train with 'int4-g32'"),
        ("nvfp4", "has no kernel for codes with TwoLevel"),
        ("mxfp4", "has no kernel for codes with PowerOfTwo"),
        ("int16", "neither an integer of at most 8 bits"),
    ],
)
def test_codes_without_a_place(kit, spec, message):
    module = kit.plain({"*": "int4-g16", "head": spec})
    with pytest.raises(ValueError, match=rf"codes of 1 layer: .*{message}(.|\n)*--drop codes"):
        make_plan(ONNX(), Trained(module))


def test_values_in_the_place_of_codes_and_a_changed_code(kit):
    module = kit.plain({"*": "int8", "head": "nf4-g16"})
    assert export_module(module, "onnx", kit.out, drop=["codes"]).passed
    weight = list(Trained(module).weights)[-1]
    assert torch.equal(Runtime(kit.out / FILE, Trained(module)).weight("head.weight"), weight.values())
    data = bytearray((kit.out / DATA).read_bytes())
    codes = module.net[0].quantizer("weight").quantize(module.net[0].weight.detach()).codes
    data[data.index(codes.numpy().tobytes())] ^= 1
    (kit.out / DATA).write_bytes(data)
    with pytest.raises(ValueError, match=r"net\.0\.weight is not what was trained"):
        ONNX().load(kit.out, Trained(module))
