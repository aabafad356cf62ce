"""README and docs/: their Python runs, and flags, tables, tests, links and headings that they name exist."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dft import DFTConfig, launch, launch_bridge
from megatron_dft.advisor import __main__ as advise
from megatron_dft.advisor import reference

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
OF_HOSTS = ("docs/migrating.md", "docs/megatron-bridge.md", "docs/nemo.md")  # Python for TRL, Bridge and NeMo
BLOCKS = [
    (name, block)
    for name, text in PAGES.items()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    if name not in OF_HOSTS
]
sys.path.insert(0, str(ROOT / "tools"))

import write_docs  # noqa: E402


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_docs_python_blocks_run(name, block):
    exec(compile(block, name, "exec"), {"__name__": "__main__"})


def test_docs_python_blocks_are_found():
    assert {name for name, _ in BLOCKS} == {"README.md", "docs/data.md", "docs/own-loop.md", "docs/weighting.md"}


@pytest.mark.parametrize("name", OF_HOSTS)
def test_docs_python_blocks_of_hosts_compile(name):
    blocks = re.findall(r"```python\n(.*?)```", PAGES[name], re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, name, "exec")


def test_readme_has_at_most_150_lines():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("path", write_docs.sections(), ids=lambda path: path.name)
def test_generated_tables_are_current(path):
    text = path.read_text()
    assert write_docs.with_sections(text, write_docs.sections()[path]) == text, "run: python tools/write_docs.py"


@pytest.mark.parametrize("name", PAGES)
def test_docs_flags_exist(name):
    known = {
        flag for action in DFTConfig.add_arguments(argparse.ArgumentParser())._actions for flag in action.option_strings
    }
    for flag in re.findall(r"(?<![\w-])--(?:no-)?dft-[a-z-]*[a-z]", PAGES[name]):
        assert flag in known, flag


def commands(text):
    """Commands of megatron_dft in a page, with continuation lines joined."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if found := re.search(r"(?:megatron-dft|-m megatron_dft[.\w]*) .*", line):
            yield found[0].split("#")[0].split("`")[0].split("|")[0]


def flags_of_megatron():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    return set(pytest.importorskip("megatron.training.arguments").add_megatron_arguments(parser)._option_string_actions)


@pytest.mark.host
@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if any(commands(text))])
def test_docs_commands_have_existing_flags(name):
    data = pytest.importorskip("megatron_dft.data.__main__")
    from megatron_dft.data import clean

    ours = launch.parser()._option_string_actions.keys() | launch_bridge._parser()._option_string_actions.keys()
    ours |= {"--world-size", "--timeout", "--version"} | advise._parser(script=True)._option_string_actions.keys()
    known = ours | flags_of_megatron() | data._parser()._option_string_actions.keys()
    for command in commands(PAGES[name]):
        only = data._parser()._option_string_actions.keys() if re.match(r"\S* ?\S*data\b", command) else known
        if "advise --model" in command:
            only = advise._parser(model=True)._option_string_actions.keys()
        if "reference" in command.split()[1]:
            only = reference._parser()._option_string_actions.keys()
        if "clean" in command.split()[1]:
            only = clean._parser()._option_string_actions.keys()
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", command):
            assert flag in only, command


@pytest.mark.parametrize("name", PAGES)
def test_docs_yaml_blocks_have_existing_keys(name):
    yaml = pytest.importorskip("yaml")
    for block in re.findall(r"```yaml\n(.*?)```", PAGES[name], re.DOTALL):
        settings = yaml.safe_load(block)
        assert settings
        if "dft" in settings:
            assert DFTConfig.from_mapping(settings["dft"]).enabled


@pytest.mark.parametrize("name", PAGES)
def test_docs_test_references_exist(name):
    for file, test in re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::(\w+))?`", PAGES[name]):
        text = (ROOT / "tests" / file).read_text()
        assert not test or f"def {test}(" in text, f"{file}::{test}"


@pytest.mark.parametrize("name", PAGES)
def test_docs_commands_name_existing_files(name):
    for path in re.findall(r"(?:python|torchrun[^`\n]*) ((?:tools|examples)/[\w/]+\.py)", PAGES[name]):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("name", PAGES)
def test_docs_links_and_headings_exist(name):
    for link, heading in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", PAGES[name]):
        path = (ROOT / name).parent / link if link else ROOT / name
        assert path.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, f"{link}#{heading}"


def test_support_matrix_dates_suites_that_ci_does_not_run():
    table = PAGES["docs/support.md"].split("It does not run these:")[1].split("\n\n")[1]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert len(rows) >= 6
    for *_, date, commits in rows:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", date) and re.fullmatch(r"[0-9a-f]{7}(, [0-9a-f]{7})*", commits)


@pytest.mark.slow
def test_site_builds_without_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    assert all(name in api for name in ("vocab_parallel_dft_loss", "DFTConfig", "Tsallis", "with_channels"))
