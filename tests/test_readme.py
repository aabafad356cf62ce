"""The Python of README and guides runs, and what they say of flags, objectives, tests and files is so."""

import argparse
import re
from pathlib import Path

import pytest

from megatron_dft import OBJECTIVES, DFTConfig, parse_objective

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
OF_OTHERS = ("docs/migrating.md", "docs/bridge-and-nemo.md")  # Python for TRL and Bridge, which are not here
BLOCKS = [
    (name, block)
    for name, text in PAGES.items()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    if name not in OF_OTHERS
]


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_docs_python_blocks_run(name, block):
    exec(compile(block, name, "exec"), {})


def test_docs_python_blocks_are_found():
    assert {name for name, _ in BLOCKS} == {"README.md", "docs/data.md"}


def test_readme_table_lists_every_objective():
    table = README.split("## Objectives")[1].split("##")[0]
    named = [parse_objective(cell).name for cell in re.findall(r"^\| `([^`-][^`]*)` \|", table, re.MULTILINE)]
    assert named == list(OBJECTIVES)


def test_readme_lists_every_flag_with_key():
    parser = DFTConfig.add_arguments(argparse.ArgumentParser(add_help=False))
    for action in parser._actions:
        name = action.option_strings[0].removeprefix("--loss-")
        row = next(line for line in README.splitlines() if re.match(rf"\| `--(\[no-\])?loss-{name}` ", line))
        key = action.dest if action.dest == "loss_type" else action.dest.removeprefix("loss_")
        assert f"`{key}`" in row


@pytest.mark.parametrize("name", PAGES)
def test_docs_flags_exist(name):
    known = {
        flag for action in DFTConfig.add_arguments(argparse.ArgumentParser())._actions for flag in action.option_strings
    }
    for flag in re.findall(r"(?<![\w-])--(?:no-)?loss-[a-z-]*[a-z]", PAGES[name]):
        assert flag in known, flag


@pytest.mark.parametrize("name", PAGES)
def test_docs_test_references_exist(name):
    for file, test in re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", PAGES[name]):
        text = (ROOT / "tests" / file).read_text()
        assert not test or f"def {test}(" in text, f"{file}::{test}"


@pytest.mark.parametrize("name", PAGES)
def test_docs_links_and_headings_exist(name):
    for link, heading in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", PAGES[name]):
        path = (ROOT / name).parent / link if link else ROOT / name
        assert path.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, f"{link}#{heading}"


def test_readme_dates_suites_that_ci_does_not_run():
    table = README.split("Last\ngreen runs:")[1].split("\n\n")[1]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert len(rows) >= 6
    for *_, date, commits in rows:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", date) and re.fullmatch(r"[0-9a-f]{7}(, [0-9a-f]{7})*", commits)
