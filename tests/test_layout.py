"""The package layout: imports point to lower layers only, Megatron is imported lazily, public names are documented."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from faults import FAULTS

import megatron_dft

PACKAGE = Path(megatron_dft.__file__).parent
LAYERS = (
    ("version", "utils", "labels"),
    ("ops",),
    ("metrics",),
    ("config", "data"),
    ("hosts",),
    ("testing",),
    ("launch", "launch_bridge", "plugins"),
    ("advisor", "doctor"),
    ("cli",),
    ("__main__", "__init__"),
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
HOST_PACKAGES = {"megatron", "nemo", "swift", "transformers", "transformer_engine", "datasets", "apex", "lightning"}
ALLOWED = {
    "hosts": HOST_PACKAGES,
    "testing": {"megatron"},
    "advisor": {"megatron", "transformers"},
    "doctor": {"megatron"},
    "data": {"transformers"},
}
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}
NODES = {name: list(ast.walk(ast.parse(path.read_text()))) for name, path in FILES.items()}


def imported(name):
    """Dotted names that a file imports, at module level and inside of functions."""
    for node in NODES[name]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: expected absolute imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(dotted):
    """The module or subpackage x of megatron_dft.x.y; `__init__` for the public names."""
    part = dotted.split(".")[1] if "." in dotted else "__init__"
    return part if part in LAYER_OF else "__init__"


@pytest.mark.parametrize("name", FILES)
def test_imports_point_to_lower_layers_only(name):
    own = name.split("/")[0]
    assert own in LAYER_OF, f"{name}.py: {own} is missing in LAYERS"
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    for dotted in imported(name):
        if dotted.split(".")[0] == "megatron_dft":
            other = module_of(dotted)
            allowed = LAYER_OF[other] < LAYER_OF[own] or (own == other and own in packages)
            assert allowed, f"{name}.py (layer {LAYER_OF[own]}) imports {dotted} (layer {LAYER_OF[other]})"


@pytest.mark.parametrize("name", FILES)
def test_only_listed_packages_import_megatron(name):
    foreign = {dotted.split(".")[0] for dotted in imported(name)} & HOST_PACKAGES
    assert foreign <= ALLOWED.get(name.split("/")[0], set()), f"{name}.py imports {foreign}"


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


def test_text_of_every_fault_occurs_once():
    """Faults of faults.py run nightly. A renamed line would leave its fault without effect until then."""
    places = {fault.name: (PACKAGE / f"{fault.module}.py").read_text().count(fault.old) for fault in FAULTS}
    assert {name: count for name, count in places.items() if count != 1} == {}
    assert len(places) == len(FAULTS)


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
