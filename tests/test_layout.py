"""The house's rules that can be checked by machine: import order, file length, mirrored tests, lazy imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qlightning"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

# What a part of the package may import of the others: everything before it in this order.
ORDER = [
    *("lazy.py", "numerics", "transforms", "adapters", "layers", "schedules", "losses", "evaluation", "allocation"),
    *("optim", "folders.py", "checkpoints.py", "shards.py", "capture.py", "solvers", "data", "tasks", "strategies"),
    *("callbacks", "methods", "export", "reporting", "benchmark", "cli.py"),
]
WITHOUT_LIGHTNING = ["numerics", "transforms", "adapters", "layers", "schedules", "losses", "capture.py", "solvers"]


def imports(path: Path) -> set[str]:
    """Dotted names of all modules a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_the_package_was_found() -> None:
    assert len(FILES) > 40
    assert {path.parts[0] for path in FILES} - {"__init__.py"} <= set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_backwards(path: Path) -> None:
    if path == Path("__init__.py"):
        return
    own = ORDER.index(path.parts[0])
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "qlightning" and len(parts) > 1:
            part = parts[1] if parts[1] in ORDER else f"{parts[1]}.py"
            assert ORDER.index(part) <= own, f"{path} imports {name}"


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] in WITHOUT_LIGHTNING], ids=str)
def test_the_lower_floors_know_nothing_of_lightning(path: Path) -> None:
    assert not {name for name in imports(path) if name.split(".")[0] in ("lightning", "pytorch_lightning")}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_are_short(path: Path) -> None:
    assert len((PACKAGE / path).read_text().splitlines()) <= 400


def test_files_of_tests_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert not {str(path): length for path, length in lengths.items() if length > 400}


# Files that are one half of another and tested through it.
TESTED_WITH = {
    "numerics/part.py": "numerics/test_spec.py",
    "numerics/autograd.py": "numerics/test_gradients.py",
    "numerics/transform.py": "numerics/test_layer_part.py",
    "numerics/in_one_pass.py": "numerics/kernels/test_kernels.py",
    "numerics/kernels/columns.py": "numerics/kernels/test_kernels.py",
    "numerics/kernels/fake_quant.py": "numerics/kernels/test_kernels.py",
    "numerics/kernels/hadamard.py": "numerics/kernels/test_kernels.py",
    "numerics/kernels/unpack.py": "numerics/kernels/test_kernels.py",
    "numerics/kernels/product.py": "numerics/kernels/test_kernels.py",
    "numerics/kernels/grouped_product.py": "numerics/kernels/test_kernels.py",
    "data/cache.py": "data/test_text.py",
    "data/progress.py": "data/test_text.py",
    "data/sources.py": "data/test_text.py",
    "data/splits.py": "data/test_text.py",
    "data/tokenizer.py": "data/test_text.py",
    "export/onnx_runtime.py": "export/test_onnx.py",
    "export/onnx_trace.py": "export/test_onnx.py",
    "layers/layer.py": "layers/test_swap.py",
    "layers/operation.py": "layers/test_contraction.py",
    "layers/stand_in.py": "layers/test_experts.py",
    "callbacks/averages.py": "callbacks/test_averaging.py",
    "strategies/extension.py": "strategies/test_gather.py",
    "reporting/loggers.py": "reporting/test_callback.py",
}


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "__init__.py"], ids=str)
def test_every_file_has_its_tests(path: Path) -> None:
    tests = TESTED_WITH.get(path.as_posix(), str(path.parent / f"test_{path.name}"))
    assert (ROOT / "tests" / tests).exists()


def test_no_exception_is_out_of_date() -> None:
    assert set(TESTED_WITH) <= {path.as_posix() for path in FILES}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import qlightning", ["torch", "lightning", "transformers"]),
        ("import qlightning.numerics", ["lightning", "transformers", "peft", "numpy.testing"]),
        ("from qlightning import convert, Scheme, Quantizer", ["lightning", "transformers", "peft"]),
        ("import qlightning.cli", ["torch", "lightning"]),
    ],
)
def test_imports_stay_light(statement: str, absent: list[str]) -> None:
    check = f"{statement}\nimport sys\nprint([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_lightning_imported_first_learns_to_load_converted_checkpoints() -> None:
    check = "import lightning.pytorch as L, qlightning\nprint(L.LightningModule.load_state_dict.__module__)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "qlightning.callbacks.loading"
