"""The README: its example prints what it says, and what it names is there."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cupy_pagedkv
from cupy_pagedkv.caches import manager
from cupy_pagedkv.replay.command import _parser

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)


EXAMPLES = [i for i, (language, _) in enumerate(BLOCKS) if language == "python"]


@pytest.mark.parametrize("at", EXAMPLES)
def test_an_example_prints_what_stands_below_it(at):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(BLOCKS[at][1], "README.md", "exec"), {})
    assert output.getvalue() == BLOCKS[at + 1][1]


def test_the_life_of_a_sequence_is_that_of_the_docstring():
    [drawn] = [text for _, text in BLOCKS if "|---- shared" in text]
    assert drawn in manager.__doc__


@pytest.mark.parametrize(
    "command", ["pip install -e '.[cli]' && python -m cupy_pagedkv", "pip install -e '.[test]' && pytest"]
)
def test_the_two_commands(command):
    assert ("", command + "\n") in BLOCKS


def test_every_public_name_is_in_the_table():
    table = README[README.index("## What there is") : README.index("## Devices")]
    for name in set(cupy_pagedkv.__all__) - {"BlockAllocatorStats"}:
        assert f"`{name}" in table, name


def test_the_options_it_names_exist():
    known = {option for action in _parser()._actions for option in action.option_strings}
    section = README[README.index("## How much cache") : README.index("## Limits")]
    assert set(re.findall(r"--[a-z][a-z-]+", section)) <= known


def test_the_report_it_shows_has_the_lines_of_a_real_one():
    [shown] = [text for _, text in BLOCKS if text.startswith("trace ")]
    command = [sys.executable, "-m", "cupy_pagedkv", "--limit", "3", "--device", "cpu"]
    real = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line[:19] for line in shown.splitlines()] == [line[:19] for line in real.splitlines()]
