"""The README's Python runs, and what it says of flags, objectives and files is so."""

import argparse
import re
from pathlib import Path

import pytest

from megatron_dft import OBJECTIVES, DFTConfig, parse_objective

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_there_is_python_to_run():
    assert BLOCKS


def test_the_table_has_every_objective_and_its_specifications_parse():
    table = README.split("## Objectives")[1].split("##")[0]
    named = [parse_objective(cell).name for cell in re.findall(r"^\| `([^`-][^`]*)` \|", table, re.MULTILINE)]
    assert named == list(OBJECTIVES)


def test_every_flag_is_listed_with_its_key():
    parser = DFTConfig.add_arguments(argparse.ArgumentParser(add_help=False))
    for action in parser._actions:
        name = action.option_strings[0].removeprefix("--loss-")
        row = next(line for line in README.splitlines() if re.match(rf"\| `--(\[no-\])?loss-{name}` ", line))
        key = action.dest if action.dest == "loss_type" else action.dest.removeprefix("loss_")
        assert f"`{key}`" in row


def test_tests_that_the_support_matrix_names_exist():
    for file, name in re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", README):
        text = (ROOT / "tests" / file).read_text()
        assert not name or f"def {name}(" in text, f"{file}::{name}"


def test_files_that_are_linked_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
