"""Rules on the source: who may import whom, no import circles, names of tests.

There is no limit on the size of a file or a folder: whether a file is one idea is left to its readers.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.launching import ROOT

PACKAGES = ("areal_like", "buffer", "launch", "rollout_server", "trainer")
POOLS = ("buffer", "rollout_server", "trainer")
MAX_TEST_NAME = 60
TEST_NAME = re.compile(r"^ *(?:async )?def (test_\w+)", re.M)
LOADS_A_MODEL = re.compile(r"\.from_(?:pretrained|config)\b")


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of all modules of the product."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def nodes_of(path: Path) -> Iterator[ast.AST]:
    """All nodes of a file's syntax tree. Those of all files would fill the memory of a process of tests."""
    return ast.walk(ast.parse(path.read_text()))


@cache
def imported_by(path: Path) -> frozenset[str]:
    """Modules of the product that a file imports, at any depth of its code and for type checking too."""
    return frozenset(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules() else node.module for name in submodules]
        else:
            continue
        yield from (name for name in names if name in modules())


def package_of(module: str) -> str:
    """The folder that a module is in, dotted."""
    return module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in list(graph):
        if node not in index:
            visit(node)
    return found


def test_pools_import_nothing_from_one_another() -> None:
    offences = [
        f"{module} imports {other}"
        for module, path in modules().items()
        for other in imported_by(path)
        if module.partition(".")[0] in POOLS
        and other.partition(".")[0] not in (module.partition(".")[0], "areal_like")
    ]
    assert not offences, offences


def test_shared_code_imports_no_pool() -> None:
    offences = [
        f"{module} imports {other}"
        for module, path in modules().items()
        for other in imported_by(path)
        if module.startswith("areal_like") and not other.startswith("areal_like")
    ]
    assert not offences, offences


@pytest.mark.parametrize("level", ["modules", "packages"])
def test_imports_form_no_circle(level: str) -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for module, path in modules().items():
        for other in imported_by(path):
            ends = (module, other) if level == "modules" else (package_of(module), package_of(other))
            nested = level == "packages" and (
                ends[0].startswith(f"{ends[1]}.") or ends[1].startswith(f"{ends[0]}.")
            )
            if ends[0] != ends[1] and not nested:
                graph[ends[0]].add(ends[1])
    assert len(graph) > len(PACKAGES)
    assert not circles(graph)


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": {"c"}}) == []


def test_test_names_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for name in TEST_NAME.findall(path.read_text())
        if len(name) >= MAX_TEST_NAME
    ]
    assert not long, long


def test_no_model_directory_runs_code() -> None:
    """Without the argument transformers asks on stdin whether to run the directory's Python."""
    trusting = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules().values()
        if LOADS_A_MODEL.search(path.read_text())
        for node in nodes_of(path)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).startswith("Auto")
        and ast.unparse(node.func).endswith((".from_pretrained", ".from_config"))
        and "trust_remote_code=False" not in map(ast.unparse, node.keywords)
    ]
    assert trusting == []
