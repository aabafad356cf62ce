"""Wheel and source archive: they build, and the wheel works in an environment with torch and without Megatron."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
# What torch imports. Links to these, and to nothing else of this environment, make it importable in an empty one.
OF_TORCH = (
    *(
        "torch",
        "torchgen",
        "functorch",
        "triton",
        "nvidia",
        "cuda",
        "sympy",
        "mpmath",
        "networkx",
        "jinja2",
        "markupsafe",
    ),
    *("filelock", "fsspec", "typing_extensions.py", "numpy", "numpy.libs", "isympy.py", "setuptools", "pkg_resources"),
)
LOSS = """
import sys, torch, megatron_dft
logits, target = torch.zeros(2, 8, requires_grad=True), torch.tensor([1, -100])
loss = megatron_dft.vocab_parallel_dft_loss(logits, target, objective="prob")
loss.sum().backward()
assert torch.allclose(loss, torch.tensor([0.875, 0.0])), loss
assert abs(logits.grad[0, 1].item() + 0.125 * 0.875) < 1e-6 and not logits.grad[1].any()
assert "megatron" not in sys.modules
print(megatron_dft.__file__)
"""


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--quiet", "--outdir", str(folder), str(ROOT)], check=True)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


@pytest.fixture(scope="module")
def environment(archives, tmp_path_factory):
    """The bin folder of an environment with the wheel and torch, and the variables to run it with."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=True)
    (folder / "torch").mkdir()
    packages = Path(__import__("torch").__file__).parents[1]
    for name in OF_TORCH:
        if (packages / name).exists():
            (folder / "torch" / name).symlink_to(packages / name)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", archives[0]], check=True)
    return python.parent, {**os.environ, "PYTHONPATH": str(folder / "torch")}


def run(environment, *command):
    folder, variables = environment
    return subprocess.run(
        [str(folder / command[0]), *command[1:]], env=variables, cwd=folder, capture_output=True, text=True
    )


def test_wheel_holds_package_alone(archives):
    names = zipfile.ZipFile(archives[0]).namelist()
    assert "megatron_dft/py.typed" in names and "megatron_dft/ops/triton_backend.py" in names
    assert all(name.startswith(("megatron_dft/", "megatron_dft-")) for name in names)


def test_source_archive_holds_tests_docs_and_tools(archives):
    with tarfile.open(archives[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {"LICENSE", "README.md", "Makefile", "constraints.txt", "mkdocs.yml", "docs/index.md", "tests/ranks.py"}
    assert expected | {"megatron_dft/cli.py", "tools/write_docs.py"} <= names


def test_loss_runs_without_megatron(environment):
    done = run(environment, "python", "-c", LOSS)
    assert done.returncode == 0, done.stderr
    assert "site-packages" in done.stdout


@pytest.mark.parametrize("command", ["", "train", "bridge", "plugin", "advise", "reference", "doctor"])
def test_console_script_prints_help(environment, command):
    done = run(environment, "megatron-dft", *command.split(), "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
    if not command:
        names = ("train", "bridge", "plugin", "data", "reference", "clean", "advise", "doctor")
        assert all(name in done.stdout for name in names)


def test_console_script_rejects_unknown_command(environment):
    done = run(environment, "megatron-dft", "fly")
    assert done.returncode == 2 and "invalid choice: 'fly'" in done.stderr


def test_console_script_without_megatron_names_what_is_missing(environment, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("")
    done = run(environment, "megatron-dft", "train", str(script), "--loss-type", "dft")
    assert done.returncode == 1 and "no Megatron with pretrain() is installed" in done.stderr
