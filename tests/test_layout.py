"""The house: imports point down only, Megatron is imported late, and every public name is documented."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_dft

PACKAGE = Path(megatron_dft.__file__).parent
FLOORS = {
    "version": 0,
    "stats": 0,
    "channels": 0,
    "data": 1,
    "objectives": 1,
    "reference": 2,
    "triton_kernels": 2,
    "metrics": 2,
    "compaction": 1,
    "autograd": 3,
    "survey": 3,
    "compiled": 4,
    "linear": 4,
    "config": 5,
    "vocab_parallel": 5,
    "hosts": 6,
    "launch": 7,
    "bridge": 7,
    "advise": 8,
    "doctor": 8,
    "__init__": 9,
}
HOST_PACKAGES = {"megatron", "nemo", "transformers", "transformer_engine", "datasets", "apex", "lightning"}
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}
NODES = {name: list(ast.walk(ast.parse(path.read_text()))) for name, path in FILES.items()}


def imported(name):
    """Full names of what a file imports, at any depth of its code."""
    for node in NODES[name]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: expected absolute imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(dotted):
    """The part of the house that megatron_dft.x.y lives in; the package itself for its public names."""
    part = dotted.split(".")[1] if "." in dotted else "__init__"
    return part if part in FLOORS else "__init__"


@pytest.mark.parametrize("name", FILES)
def test_imports_point_to_lower_layers_only(name):
    own = name.split("/")[0]
    assert own in FLOORS, f"{name}.py has no floor yet"
    for dotted in imported(name):
        if dotted.split(".")[0] == "megatron_dft":
            below = FLOORS[room(dotted)] < FLOORS[own] or own == room(dotted) in ("hosts", "data")
            assert below, f"{name}.py (floor {FLOORS[own]}) imports {dotted}"


@pytest.mark.parametrize("name", FILES)
def test_only_hosts_import_megatron(name):
    foreign = {dotted.split(".")[0] for dotted in imported(name)} & HOST_PACKAGES
    allowed = {"transformers"} if name.startswith("data/") else set()
    assert foreign <= allowed or name.startswith("hosts/"), f"{name}.py imports {foreign}"


def test_package_import_imports_no_host():
    code = "import sys, megatron_dft; print(*{m.split('.')[0] for m in sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    modules = set(out.stdout.split())
    assert {"torch", "megatron_dft"} <= modules
    assert not modules & HOST_PACKAGES


@pytest.mark.parametrize("name", FILES)
def test_every_file_and_public_definition_has_docstring(name):
    tree = ast.parse(FILES[name].read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    missing = [n.name for n in tree.body if isinstance(n, kinds) and n.name[0] != "_" and not ast.get_docstring(n)]
    assert not missing, f"{name}.py: no docstring at {missing}"
    assert ast.get_docstring(tree) or not any(isinstance(n, kinds) for n in tree.body), f"{name}.py: no docstring"


def test_public_names_are_unique_and_documented():
    names = megatron_dft.__all__
    assert len(names) == len(set(names))
    for value in (getattr(megatron_dft, name) for name in names):
        if callable(value):
            assert inspect.getdoc(value) and not inspect.getdoc(value).startswith(f"{value.__name__}(")
    for objective in megatron_dft.OBJECTIVES.values():
        assert objective.__doc__.strip().split("\n")[0] and not objective.__doc__.startswith(f"{objective.__name__}(")


def test_loss_functions_take_options_as_keywords_only():
    for function, positional in (
        ("vocab_parallel_dft_loss", 2),
        ("vocab_stats", 2),
        ("token_loss", 2),
        ("linear_dft_loss", 3),
    ):
        kinds = [p.kind for p in inspect.signature(getattr(megatron_dft, function)).parameters.values()]
        assert kinds[:positional] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * positional
        assert set(kinds[positional:]) == {inspect.Parameter.KEYWORD_ONLY}
