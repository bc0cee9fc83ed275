"""Floors: what stands on what; and that ARCHITECTURE.md says so."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cupy_pagedkv"
FLOORS = ("bookkeeping", "emulator", "devices", "operations", "caches", "replay", "the doors")  # the lowest first
PAGE = (ROOT / "ARCHITECTURE.md").read_text()


def name_of(path: Path) -> str:
    """As it is imported: ``caches.cache``, ``caches``, and the empty name of the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path.read_text() for path in PACKAGE.rglob("*.py")}
FOLDERS = {name_of(path) for path in PACKAGE.rglob("__init__.py")}


def imports(module: str, source: str, modules: set[str], folders: set[str]) -> set[str]:
    """What a module imports of the package, wherever in it: in functions and for types, too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = ["cupy_pagedkv", *module.split(".")] if module else ["cupy_pagedkv"]
            if node.level:
                here = here[: len(here) + (module in folders) - node.level]
            base = ".".join([*(here if node.level else []), *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for package, *inside in (name.split(".") for name in names):
            if package == "cupy_pagedkv":  # the module, or the longest part of the name that is one
                beginnings = (".".join(inside[:end]) for end in range(len(inside), -1, -1))
                found.add(next(name for name in beginnings if name in modules))
    return found


def floor_of(module: str) -> int:
    folder = module.split(".")[0]
    return FLOORS.index(folder) if folder in FLOORS else FLOORS.index("the doors")


def upward(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    return sorted((a, b) for a, of_a in graph.items() for b in of_a if floor_of(b) > floor_of(a))


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules each of which leads to all others, if there are any."""
    left = {module: set(others) for module, others in graph.items()}
    while ends := [module for module, others in left.items() if not others & left.keys()]:
        for module in ends:
            del left[module]
    return sorted(left)


GRAPH = {module: imports(module, source, set(SOURCES), FOLDERS) for module, source in SOURCES.items()}


def test_imports_point_to_the_same_floor_or_a_lower_one():
    assert upward(GRAPH) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circle(GRAPH) == []


def test_every_folder_is_a_floor():
    assert {module.split(".")[0] for module in FOLDERS - {""}} == set(FLOORS[:-1])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from ..operations import copies", {"operations.copies"}),
        ("def f():\n    from ..caches.cache import PagedKVCache", {"caches.cache"}),
        ("if TYPE_CHECKING:\n    from .layout import Layout", {"devices.layout"}),
        ("import cupy_pagedkv.caches.manager as m", {"caches.manager"}),
        ("from cupy_pagedkv import BlockTable", {""}),
        ("from . import threads", {"devices.threads"}),
        ("import cupy, numpy", set()),
        ("from cupyx import jit", set()),
    ],
)
def test_what_counts_as_an_import(source, expected):
    assert imports("devices.backend", source, set(SOURCES), FOLDERS) == expected
    upwards = {name for name in expected if name.startswith(("operations", "caches")) or not name}
    assert upward({"devices.backend": expected}) == sorted(("devices.backend", name) for name in upwards)


def test_a_package_imports_its_own_modules():
    assert imports("caches", "from .cache import PagedKVCache", set(SOURCES), FOLDERS) == {"caches.cache"}
    assert imports("", "from .caches.cache import PagedKVCache", set(SOURCES), FOLDERS) == {"caches.cache"}


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == ["a", "b", "c", "d"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_page_names_each_module_where_it_is():
    assert len(PAGE.splitlines()) <= 80
    rows = re.findall(r"^\| (the doors|`\w+/`) \|[^|]*\|(.*)\|$", PAGE, re.M)
    assert [name.strip("`/") for name, _ in rows] == list(FLOORS[::-1])
    for name, modules in rows:
        folder = PACKAGE / ("" if name == "the doors" else name.strip("`/"))
        there = {path.name for path in folder.glob("*.*pp") if path.is_file()} | {
            path.stem for path in folder.glob("*.py")
        }
        there -= {"__init__"} if folder != PACKAGE else set()
        assert set(re.findall(r"`([\w.]+)`", modules)) == there, name


def test_the_page_names_each_kernel():
    beside = PAGE[PAGE.index("Beside the package") : PAGE.index("## How a call")]
    assert set(re.findall(r"`(\w+\.cuh?)`", beside)) == {path.name for path in (ROOT / "kernels").iterdir()}
