"""llama.cpp itself computes what was trained."""

import sys

import pytest

from qlightning.export.commands import export_module, verify_module
from qlightning.export.gguf import GGUF
from qlightning.export.llama_cpp import LlamaCpp

REASON = "llama-cpp-python is not installed: it is built from source for twenty minutes (pip install .[llama-cpp])"
RUNTIME = {"runtime": "llama.cpp"}


@pytest.fixture
def binding():
    pytest.importorskip("llama_cpp", reason=REASON)


@pytest.mark.parametrize("spec", ["gguf-q4_0", "gguf-q8_0", "mxfp4"])
def test_with_its_own_rounding_of_inputs_it_is_the_trained_model(kit, binding, spec):
    module = kit.llama({"*": {"weight": spec, "input": "gguf-q8_0"}})
    proof = export_module(module, "gguf", kit.out, options=RUNTIME)
    assert proof.passed
    assert proof.outputs.sqnr > 60
    assert (proof.layers, proof.without) == ([], [])
    assert verify_module(module, kit.out).outputs == proof.outputs


@pytest.mark.parametrize("spec", ["gguf-tq2_0", "gguf-q4_1"])
def test_with_float_inputs(kit, binding, spec):
    module = kit.llama(spec, hidden_size=256, intermediate_size=256)
    proof = export_module(module, "gguf", kit.out, options=RUNTIME)
    assert 20 < proof.outputs.sqnr < 45
    assert "rounds inputs to 8 bits" in str(proof.tolerance)


def test_a_wrong_scale_is_noticed(kit, binding, monkeypatch):
    from qlightning.export import gguf

    own = gguf._bytes
    monkeypatch.setattr(gguf, "_bytes", lambda x: own(x * 1.05))
    with pytest.raises(ValueError, match="does not compute what was trained"):
        export_module(kit.llama({"*": {"weight": "gguf-q4_0", "input": "gguf-q8_0"}}), "gguf", kit.out, options=RUNTIME)


def test_a_broken_file(tmp_path, binding):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"cannot load model.gguf: .*failed"):
        LlamaCpp(tmp_path / "model.gguf")


def test_without_the_binding(kit, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ModuleNotFoundError, match=r"qlightning\[llama-cpp\].*leave runtime out"):
        export_module(kit.llama("gguf-q4_0"), "gguf", kit.out, options=RUNTIME)
    assert not kit.out.exists()


def test_inputs_that_only_llama_cpp_rounds(kit):
    module = kit.llama({"*": {"weight": "gguf-q4_0", "input": "gguf-q8_0"}})
    with pytest.raises(ValueError, match=r"prove it with options runtime='llama.cpp'"):
        export_module(module, "gguf", kit.out)
    assert export_module(module, "gguf", kit.out, drop=["input"]).without == ["input"]
    with pytest.raises(ValueError, match=r"runtime='gguf'\): write 'transformers' or 'llama.cpp'"):
        GGUF(runtime="gguf")
