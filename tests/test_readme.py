"""The README and the pages of docs/: their examples print what they say, and what they name is there."""

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

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES["README.md"]
BLOCKS = {name: re.findall(r"^```(\w*)\n(.*?)^```$", page, re.M | re.S) for name, page in PAGES.items()}
NAMES: dict[str, dict[str, object]] = {name: {} for name in PAGES}
"""What the examples of a page have defined, for those behind them."""
EXAMPLES = [
    (name, i) for name, blocks in BLOCKS.items() for i, (language, _) in enumerate(blocks) if language == "python"
]


@pytest.mark.parametrize(("page", "at"), EXAMPLES)
def test_an_example_prints_what_stands_below_it(page, at, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where files are left
    for package in ("torch", "transformers"):
        uses = re.search(rf"^(from|import) {package}\b", BLOCKS[page][at][1], re.M)
        if uses or (package == "torch" and page == "clients.md"):
            pytest.importorskip(package, reason=f"{package} is not installed")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(BLOCKS[page][at][1], page, "exec"), NAMES[page])
    assert output.getvalue() == BLOCKS[page][at + 1][1]


def test_there_are_examples():
    assert {page for page, _ in EXAMPLES} == {
        "README.md",
        "attention.md",
        "clients.md",
        "kernels.md",
        "many-sequences.md",
        "scale.md",
    }


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_page_is_linked():
    for page in PAGES.keys() - {"README.md"}:
        assert f"(docs/{page})" in README


def test_the_life_of_a_sequence_is_that_of_the_docstring():
    [drawn] = [text for _, text in BLOCKS["many-sequences.md"] if "|---- shared" in text]
    assert drawn in manager.__doc__


@pytest.mark.parametrize(
    "command", ["pip install -e '.[cli]' && python -m cupy_pagedkv", "pip install -e '.[test]' && pytest"]
)
def test_the_two_commands(command):
    assert ("", command + "\n") in BLOCKS["README.md"]


def test_every_public_name_is_in_the_table():
    table = README[README.index("## What there is") : README.index("## Attention")]
    for name in set(cupy_pagedkv.__all__) - {"BlockAllocatorStats"}:
        assert f"`{name}" in table, name


def test_the_options_it_names_exist():
    known = {option for action in _parser()._actions for option in action.option_strings}
    named = set(re.findall(r"--[a-z][a-z-]+", PAGES["traffic.md"]))
    assert named
    assert named <= known


def test_the_reports_it_shows_have_the_lines_of_real_ones():
    reports = [text for _, text in BLOCKS["traffic.md"] if text.startswith("trace ")]
    for shown, options in zip(reports, ([], ["--host-blocks", "9"]), strict=True):
        command = [sys.executable, "-m", "cupy_pagedkv", "--limit", "3", "--device", "cpu", *options]
        real = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert [line[:19] for line in shown.splitlines()] == [line[:19] for line in real.splitlines()]


def test_the_llama_it_shows_prints_what_a_real_one_does():
    """But for how long it took."""
    blocks = [text for _, text in BLOCKS["README.md"]]
    shown = blocks[blocks.index("python examples/llama.py\n") + 1]
    command = [sys.executable, "examples/llama.py"]
    real = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    shown, real = (re.sub(r"[\d.]+ s: |\d+ a second", "", text) for text in (shown, real))
    assert shown == real
