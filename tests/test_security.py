"""What a stranger's file can do: nothing but be read or be refused.

No pickle and no code from any file that is loaded; YAML names classes of the type that is asked for; whatever the spec
parser, the describer of quantizers, the config reader and the reader of artifacts are given, they answer or raise
ValueError. What fuzzing found stands as `@example`.
"""

import ast
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlightning.cli import main
from qlightning.export.artifact import MANIFEST, read_manifest, read_metadata, read_tensors
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.spec import _FORMATS, _WORDS, parse, rebuild, unparse

PACKAGE = Path(__file__).parents[1] / "qlightning"
FILES = sorted(PACKAGE.rglob("*.py"))

# --- the code ---

FORBIDDEN = {"eval", "exec", "compile", "__import__"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def unsafe(tree: ast.AST) -> list[str]:
    """The calls in a file that could run what another file says."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        loads = name == "torch.load" and given.get("weights_only") != "True"
        arrays = given.get("allow_pickle", "False") != "False"
        pickles = name.split(".")[0] in PICKLES and name.split(".")[-1] in ("load", "loads", "Unpickler")
        plain_yaml = name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load")
        trusts = given.get("trust_remote_code", "False") != "False" or given.get("weights_only", "True") == "False"
        if loads or arrays or pickles or plain_yaml or trusts or name in FORBIDDEN or name == "os.system":
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_that_is_loaded_can_run_code(path):
    assert unsafe(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        *("torch.load(p)", "torch.load(p, weights_only=False)", "pickle.loads(x)", "eval(x)", "yaml.load(f)"),
        *("np.load(p, allow_pickle=True)", "AutoModel.from_pretrained(p, trust_remote_code=True)"),
    ],
)
def test_the_search_finds_what_it_looks_for(line):
    assert unsafe(ast.parse(line))


# --- YAML of strangers ---

BORING = "lightning.pytorch.demos.boring_classes.Boring"
POPEN = "{class_path: subprocess.Popen, init_args: {args: [touch, ran]}}"
STRANGERS = {
    "model": f"{{model: {POPEN}}}",
    "function": "{model: os.system}",
    "data": f"{{model: {BORING}Model, data: {POPEN}}}",
    "callback": f"{{model: {BORING}Model, trainer: {{callbacks: [{POPEN}]}}}}",
    "logger": f"{{model: {BORING}Model, trainer: {{logger: {POPEN}}}}}",
    "policy": f"{{model: {BORING}Model, trainer: {{callbacks: "
    f"[{{class_path: qlightning.FiniteCallback, init_args: {{policy: {POPEN}}}}}]}}}}",
    "phase": f"{{model: {BORING}Model, trainer: {{callbacks: "
    f"[{{class_path: qlightning.QATCallback, init_args: {{weight: int4, init: {POPEN}}}}}]}}}}",
    "method": f"{{model: {BORING}Model, method: {POPEN}}}",
    "tag": "model: !!python/object/apply:os.system ['touch ran']",
}


@pytest.mark.filterwarnings(r"ignore:\s*.*was deprecated in v4:DeprecationWarning")
@pytest.mark.filterwarnings(r"ignore:\s*By default only one Jsonargparse:DeprecationWarning")
@pytest.mark.parametrize(
    "text",
    # building the command line takes seconds: two of them always, the others where there is time
    [
        pytest.param(text, id=k, marks=[] if k in ("model", "policy") else pytest.mark.slow)
        for k, text in STRANGERS.items()
    ],
)
def test_yaml_names_only_classes_of_the_type_that_is_asked_for(tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    Path("stranger.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "stranger.yaml"])
    assert stop.value.code == 2, capsys.readouterr().err
    assert os.listdir() == ["stranger.yaml"]


# --- descriptions in checkpoints ---


def test_a_description_imports_nothing_but_ours(tmp_path, monkeypatch):
    (tmp_path / "strange_part.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("strange_part:Part", "os:system", "subprocess:Popen", "qlightning.cli:main", "builtins:eval", ":", ""):
        with pytest.raises(ValueError, match="is not a quantizer part known here"):
            rebuild({"class": name, "arguments": {}})
    assert "strange_part" not in sys.modules


# --- fuzzing ---

FEW = settings(max_examples=100, deadline=None, derandomize=True, database=None)
MANY = settings(max_examples=20_000, deadline=None, database=None)

specs = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from([*_FORMATS, *_WORDS, "g0", "b1x", "p101", "int17", ""]), max_size=6).map("-".join),
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | specs,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
PARTS = ["Quantizer", "formats:Int", "formats:Ternary", "granularity:PerGroup", "scales:Percentile", "codebooks:Levels"]
descriptions = st.recursive(
    plain,
    lambda inner: st.fixed_dictionaries(
        {
            "class": st.sampled_from([f"qlightning.numerics.{part}" for part in PARTS]) | st.text(max_size=20),
            "arguments": st.dictionaries(
                st.sampled_from(["bits", "format", "granularity", "size", "percent", "values", "x"]), inner, max_size=3
            ),
        }
    ),
    max_leaves=4,
)


def check_spec(text):
    try:
        quantizer = parse(text)
    except ValueError:
        return
    said = unparse(quantizer)
    assert said is not None
    assert parse(said) == quantizer


def check_description(data):
    try:
        found = rebuild(data)
    except ValueError:
        return
    assert found is not None


def check_artifact(manifest, index, header, body):
    """A folder of any three files: read, or refused."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / MANIFEST).write_bytes(manifest)
        (folder / "model.safetensors.index.json").write_bytes(index)
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + body)
        for read in (read_manifest, read_metadata, lambda folder: list(read_tensors(folder))):
            try:
                read(folder)
            except ValueError:
                continue


@settings(FEW, max_examples=30)  # a wrong spec takes a moment: the nearest right one is looked for
@given(specs)
@example("int4-g128")
@example("gguf-q4_0-g32")
def test_specs(text):
    check_spec(text)


@FEW
@given(descriptions)
@example({"class": "qlightning.numerics.formats:Int", "arguments": {}})
def test_descriptions(data):
    check_description(data)


as_json = plain.map(lambda data: json.dumps(data).encode())
files = st.dictionaries(st.sampled_from(["files", "weight_map", "sha256", "format"]), plain, max_size=3)
texts = st.binary(max_size=60) | as_json | files.map(lambda data: json.dumps(data).encode())
tensors = st.dictionaries(
    st.text(max_size=4),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "I8", "F4", "X"]),
            "shape": st.lists(st.integers(-1, 2**62), max_size=3),
            "data_offsets": st.lists(st.integers(-1, 2**64), max_size=3),
        }
    ),
    max_size=2,
).map(lambda data: json.dumps(data).encode())


@FEW
@given(texts, texts, texts | tensors, st.binary(max_size=16))
@example(b'{"files": {"../x": 1}}', b'{"weight_map": {"w": "/etc/passwd"}}', b"{}", b"")
def test_artifacts(manifest, index, header, body):
    check_artifact(manifest, index, header, body)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["specs", "descriptions", "artifacts"])
def test_for_long(what):
    check, *given_ = {
        "specs": (check_spec, specs),
        "descriptions": (check_description, descriptions),
        "artifacts": (check_artifact, texts, texts, texts | tensors, st.binary(max_size=16)),
    }[what]
    MANY(given(*given_)(check))()


def test_what_the_fuzzer_builds_is_sometimes_right():
    assert isinstance(rebuild({"spec": "int4-g128"}), Quantizer)
